// Package admintest is a hansed that is only its answers: an admin.Backend of a fixed mesh west, east and north, seen from west.
// It remembers tokens, objects, trust and drills as a real one would, and its times are fixed, so that tests can compare output whole.
package admintest

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"sigs.k8s.io/yaml"

	"github.com/hanse-mesh/hanse/cmd/internal/admin"
	"github.com/hanse-mesh/hanse/discovery"
)

// Fake is the Backend. Use New.
type Fake struct {
	now func() time.Time

	mu      sync.Mutex // guards all below
	tokens  map[string]string
	members []string // joined beside west
	trust   map[string]admin.TrustDomain
	objects []admin.Object
	drills  []*fakeDrill
	held    string
}

type fakeDrill struct {
	admin.Drill
	stop chan struct{}
}

var _ admin.Backend = (*Fake)(nil)

// New returns a Fake whose clock is now.
func New(now func() time.Time) *Fake {
	f := &Fake{now: now, tokens: map[string]string{}, members: []string{"east", "north"}, trust: map[string]admin.TrustDomain{}, held: "north"}
	for i, name := range []string{"west", "east", "north"} {
		td := name + ".demo"
		f.trust[td] = admin.TrustDomain{Name: td, Own: i == 0, Member: name, Sequence: uint64(i + 3), Source: "mesh", Age: 120,
			Authorities: []string{fmt.Sprintf("9f3a%02x…41, expires in 6d", i)}}
	}
	own := f.trust["west.demo"]
	own.Acked, own.Missing = []string{"east"}, []string{"north"}
	f.trust["west.demo"] = own
	return f
}

func ptr[T any](v T) *T { return &v }

// Clusters has one member of each state that people see most.
func (f *Fake) Clusters(context.Context) (admin.Clusters, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	all := map[string]admin.Cluster{
		"east": {Name: "east", ID: "e1", TrustDomain: "east.demo", State: "fresh", StateAge: 600, Lag: ptr(int64(0)), SeenAge: ptr(1.2), Revision: 118,
			Synced: true, Exports: 6, Endpoints: 18, Probe: admin.Probe{Known: true, OK: true, RTT: 0.0013, Age: 3}, Region: "eu-1", Network: "east",
			Addresses: []string{"127.0.2.1:7443"}, Gateways: []string{"127.0.2.9:15443", "127.0.2.10:15443"}, Version: "v0.1.0"},
		"north": {Name: "north", ID: "n1", TrustDomain: "north.demo", State: "suspect", StateAge: 27, SeenAge: ptr(47.0), Revision: 51, Synced: true,
			Exports: 4, Endpoints: 12, Probe: admin.Probe{Known: true, OK: true, RTT: 0.012, Age: 3}, Region: "us-1", Network: "north",
			Addresses: []string{"127.0.3.1:7443"}, Gateways: []string{"127.0.3.9:15443"}, Version: "v0.1.0",
			Note: "control plane silent for 47s; its 12 endpoints stay in use, ranked behind others (data path answers)."},
	}
	c := admin.Clusters{Mesh: "demo", Clusters: []admin.Cluster{{Name: "west", ID: "w1", Self: true, TrustDomain: "west.demo", State: "self",
		StateAge: 3600, Synced: true, Exports: 6, Endpoints: 18, Region: "eu-1", Network: "west", Addresses: []string{"127.0.1.1:7443"},
		Gateways: []string{"127.0.1.9:15443"}, Version: "v0.1.0"}}}
	for _, m := range f.members {
		c.Clusters = append(c.Clusters, all[m])
	}
	if f.held != "" && slices.Contains(f.members, f.held) {
		for i := range c.Clusters {
			if c.Clusters[i].Name == f.held {
				c.Clusters[i].Held = "its list is 60 keys short of what it announces"
			}
		}
	}
	return c, nil
}

// Status is red because of north.
func (f *Fake) Status(ctx context.Context) (admin.Status, error) {
	c, err := f.Clusters(ctx)
	return admin.Status{
		Cluster: "west", TrustDomain: "west.demo", Version: "v0.1.0", OK: false, Summary: "west works; north's control plane is silent.",
		Checks: []admin.Check{
			{Name: "configuration", OK: true, Detail: "loaded, 14 objects"},
			{Name: "SVID", OK: true, Detail: "spiffe://west.demo/hanse/control-plane, expires in 41m"},
			{Name: "proxies", Warn: true, Detail: "1 of 5 has refused its configuration", Remedy: "hanse proxies says which, and why"},
			{Name: "peer north", Detail: "no answer for 47s", Remedy: "on north: hanse status, and see that 127.0.3.1:7443 can be reached from here"},
		},
		Clusters: c.Clusters, Proxies: 5, Services: 3,
	}, err
}

// Services has one in all clusters, one that is not exported, and one with a conflict.
func (f *Fake) Services(context.Context) ([]admin.Service, error) {
	port := []discovery.Port{{Name: "http", Number: 8080, Protocol: "http"}}
	return []admin.Service{
		{Namespace: "shop", Name: "frontend", Host: "frontend.shop.svc.clusterset.local", Ports: port,
			Clusters: []admin.ServicePart{{Cluster: "west", Ready: 1, Total: 1, State: "self"}}},
		{Namespace: "shop", Name: "payments", Host: "payments.shop.svc.clusterset.local", Ports: port, Exported: true, Clusters: []admin.ServicePart{
			{Cluster: "west", Ready: 4, Total: 4, State: "self"},
			{Cluster: "east", Ready: 3, Total: 3, State: "fresh", Revision: 118, Age: ptr(1.0)},
			{Cluster: "north", Ready: 3, Total: 4, State: "suspect", Revision: 51, Age: ptr(47.0)}}},
		{Namespace: "stock", Name: "catalog", Host: "catalog.stock.svc.clusterset.local", Ports: port, Exported: true, Unexported: 1,
			Clusters:  []admin.ServicePart{{Cluster: "west", Ready: 2, Total: 2, State: "self"}, {Cluster: "east", Ready: 2, Total: 2, State: "fresh"}},
			Conflicts: []string{"east: PortConflict: port http is 8080 by the oldest export, 9090 here"}},
	}, nil
}

// Endpoints knows shop/payments.
func (f *Fake) Endpoints(_ context.Context, service string) ([]admin.Endpoint, error) {
	if service != "shop/payments" {
		return nil, admin.NotFound("hanse services lists what there is", "no service %s", service)
	}
	return []admin.Endpoint{
		{ID: "a1", Cluster: "west", Region: "eu-1", Zone: "eu-1a", Address: "127.0.1.12:8080", Network: "west", Ready: true, State: "self", Health: "healthy",
			SPIFFEID: "spiffe://west.demo/ns/shop/sa/payments", Transport: "hop"},
		{ID: "a2", Cluster: "west", Region: "eu-1", Zone: "eu-1b", Address: "127.0.1.13:8080", Network: "west", Ready: true, Draining: true, State: "self",
			Health: "ejected", SPIFFEID: "spiffe://west.demo/ns/shop/sa/payments", Transport: "hop"},
		{ID: "b1", Cluster: "north", Region: "us-1", Zone: "us-1a", Address: "127.0.3.12:8080", Network: "north", State: "suspect",
			SPIFFEID: "spiffe://north.demo/ns/shop/sa/payments", Transport: "hop", Revision: 51, SeenAge: 47},
	}, nil
}

// Proxies has one that NACKed.
func (f *Fake) Proxies(context.Context) ([]admin.Proxy, error) {
	return []admin.Proxy{
		{ID: "frontend-1", SPIFFEID: "spiffe://west.demo/ns/shop/sa/frontend", Role: "sidecar", Region: "eu-1", Zone: "eu-1a", Connected: 3600, Version: "v0.1.0",
			State: "current", ConfigAge: 3, TrustAcked: true, Resources: []admin.ProxyConfig{{Type: "Listener", Names: 2, Sent: "118", Acked: "118"}}},
		{ID: "payments-1", SPIFFEID: "spiffe://west.demo/ns/shop/sa/payments", Role: "sidecar", Region: "eu-1", Zone: "eu-1b", Connected: 90, Version: "v0.1.0",
			State: "nacked", ConfigAge: 64, TrustAcked: true, Resources: []admin.ProxyConfig{
				{Type: "RouteConfiguration", Names: 1, Sent: "118", Acked: "117", NACK: `route shop/payments rule 2: regex "(": missing closing )`}}},
	}, nil
}

// Explain knows payments, which works, and ledger, which does not.
func (f *Fake) Explain(_ context.Context, req admin.ExplainRequest) (admin.Explanation, error) {
	switch req.To {
	case "shop/payments":
		return admin.Explanation{
			OK: true, Summary: "OK: a call from west/shop/frontend (eu-1a) to payments.shop:8080 goes to west, zone eu-1a, 2 of 2 endpoints healthy.",
			From: "shop/frontend", To: req.To, Name: "payments.shop.svc.clusterset.local → imported from west, east, north (same ports, no conflict)",
			Route: "HTTPRoute shop/payments rule 2 (path prefix " + req.Path + "): 90% payments, 10% payments-v2",
			Levels: []admin.ExplainLevel{
				{Level: 0, Cluster: "west", Region: "eu-1", Zone: "eu-1a", Healthy: 2, Total: 2, Share: 1,
					Endpoints: []admin.ExplainEndpoint{{ID: "a1", Address: "127.0.1.12:8080", Health: "healthy", Reason: "same zone"}}},
				{Level: 1, Cluster: "east", Region: "eu-1", Healthy: 3, Total: 3, Note: "through east's gateways 127.0.2.9:15443 (up)"},
			},
			Trust:  []string{"caller spiffe://west.demo/ns/shop/sa/frontend, expires in 41m", "server must be spiffe://{west,east}.demo/ns/shop/sa/payments"},
			Policy: []string{"AccessPolicy shop/payments allows frontend"},
			Config: []string{"frontend's sidecar has version 118 (current), acknowledged 3s ago"},
		}, nil
	case "ledger":
		return admin.Explanation{
			Summary: "FAILS: north does not trust west.demo, so no sidecar in north accepts this caller. (1 of 1 levels affected)",
			Remedy:  "on north: hanse trust add west.demo", From: req.From, To: "ledger", Name: "ledger.shop.svc.clusterset.local → imported from north",
			Levels: []admin.ExplainLevel{{Cluster: "north", Region: "us-1", Total: 1}},
		}, nil
	}
	return admin.Explanation{}, admin.NotFound("hanse services lists what there is", "no service %q", req.To)
}

// CreateToken makes the token hns1_FOR.
func (f *Fake) CreateToken(_ context.Context, req admin.TokenRequest) (admin.Token, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	who := req.For + req.Workload
	if slices.Contains(f.members, req.For) {
		return admin.Token{}, admin.Refused("hanse leave "+req.For+" takes it out first", "cluster %q is a member already", req.For)
	}
	t := "hns1_" + strings.ReplaceAll(who, "/", "_")
	f.tokens[t] = who
	ttl := req.TTL
	if ttl == 0 {
		ttl = 900
	}
	return admin.Token{Token: t, For: who, Expires: f.now().Add(time.Duration(ttl * float64(time.Second)))}, nil
}

// Join knows the tokens hns1_good, hns1_unreachable and hns1_used.
func (f *Fake) Join(_ context.Context, req admin.JoinRequest, emit func(admin.Event) error) (admin.JoinResult, error) {
	events := []admin.Event{
		admin.StepEvent(`Joining mesh "demo" through west (trust domain west.demo)`),
		admin.CheckEvent(admin.Check{Name: "token valid", OK: true, Detail: "14m left, pins west's bundle 9f3a…41"}),
		admin.CheckEvent(admin.Check{Name: "clocks agree", OK: true, Detail: "0.2s apart"}),
		admin.CheckEvent(admin.Check{Name: "east → west:7443", OK: true, Detail: "mTLS as spiffe://east.demo/hanse/control-plane, 1.1ms"}),
	}
	var err error
	switch req.Token {
	case "hns1_used":
		return admin.JoinResult{}, admin.Refused("make another on west: hanse token create --for east", "this token was used by another cluster")
	case "hns1_unreachable":
		events = append(events, admin.CheckEvent(admin.Check{Name: "west → east:7443", Detail: "no route to 127.0.2.1:7443",
			Remedy: "open the port, or give an address that west can reach: hansed --federation-advertise HOST:PORT"}))
		err = admin.Refused("", "1 of 4 checks failed")
	case "hns1_good":
	default:
		return admin.JoinResult{}, admin.Invalid("copy the whole of it, from hns1_ to its end", "this is not a mesh token")
	}
	for _, e := range events {
		if err := emit(e); err != nil {
			return admin.JoinResult{}, err
		}
	}
	return admin.JoinResult{Mesh: "demo", Cluster: "east", Through: "west", TrustDomain: "west.demo", Members: []string{"west", "east", "north"},
		Accepts: []string{"west: namespaces *, IDs spiffe://west.demo/ns/*/sa/*"}, Imports: 14, Exports: 6}, err
}

// Leave knows the members.
func (f *Fake) Leave(_ context.Context, req admin.LeaveRequest) (admin.LeaveResult, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if req.Member == "" {
		return admin.LeaveResult{Member: "west", State: "left", Told: []string{"east"}, Untold: []string{"north"}}, nil
	}
	i := slices.Index(f.members, req.Member)
	if i < 0 {
		return admin.LeaveResult{}, admin.NotFound("hanse clusters lists the members", "no member %q", req.Member)
	}
	if req.Member == "north" && !req.Force {
		return admin.LeaveResult{}, admin.Refused("hanse leave north --force removes it without its word", "north cannot be asked: no answer for 47s")
	}
	f.members = slices.Delete(f.members, i, i+1)
	return admin.LeaveResult{Member: req.Member, State: "left", Told: slices.Clone(f.members)}, nil
}

// AcceptHeld accepts north's loss, once.
func (f *Fake) AcceptHeld(_ context.Context, member string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.held != member {
		return admin.Refused("", "nothing is held back of %q", member)
	}
	f.held = ""
	return nil
}

// TrustList is by name, own first.
func (f *Fake) TrustList(context.Context) ([]admin.TrustDomain, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var l []admin.TrustDomain
	for _, td := range f.trust {
		l = append(l, td)
	}
	slices.SortFunc(l, func(a, b admin.TrustDomain) int {
		if a.Own != b.Own {
			return map[bool]int{true: -1, false: 1}[a.Own]
		}
		return strings.Compare(a.Name, b.Name)
	})
	return l, nil
}

// TrustShow shows one.
func (f *Fake) TrustShow(_ context.Context, name string) (admin.TrustDomain, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	td, ok := f.trust[name]
	if !ok {
		return td, admin.NotFound("hanse trust list lists them", "trust domain %s is not trusted", name)
	}
	td.Bundle = json.RawMessage(`{"keys":[],"spiffe_sequence":3}`)
	return td, nil
}

// TrustAdd adds one.
func (f *Fake) TrustAdd(_ context.Context, req admin.TrustAdd) (admin.TrustDomain, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	td := admin.TrustDomain{Name: req.TrustDomain, Source: "applied", Authorities: []string{}, Allow: req.Allow}
	if req.EndpointURL != "" {
		td.Source = "endpoint"
	}
	f.trust[req.TrustDomain] = td
	return td, nil
}

// IssueAdmin signs nothing.
func (f *Fake) IssueAdmin(_ context.Context, req admin.AdminRequest) (admin.AdminSVID, error) {
	if req.Name == "" {
		return admin.AdminSVID{}, admin.Invalid("", "an administrator has a name")
	}
	return admin.AdminSVID{ID: "spiffe://west.demo/hanse/admin/" + req.Name, Chain: [][]byte{[]byte("not a certificate")}, Bundle: json.RawMessage(`{}`),
		Address: "127.0.1.1:7447", Expires: f.now().Add(12 * time.Hour)}, nil
}

// Identities are fixed.
func (f *Fake) Identities(context.Context) ([]admin.Identity, error) {
	seen := 2.5
	agent := admin.IdentityAgent{ID: "spiffe://west.demo/spire/agent/hanse_token/payments-1", Type: "join_token", Expires: f.now().Add(20 * time.Hour), Seen: &seen}
	return []admin.Identity{
		{ID: "spiffe://west.demo/ns/shop/sa/frontend", Services: []string{}, Entries: []admin.IdentityEntry{}, Agents: []admin.IdentityAgent{}},
		{ID: "spiffe://west.demo/ns/shop/sa/payments", Services: []string{"payments.shop"}, Agents: []admin.IdentityAgent{agent}, Entries: []admin.IdentityEntry{
			{ID: "e1", Parent: agent.ID, Selectors: []string{"unix:uid:1000"}, FederatesWith: []string{"east.demo"}}}},
		{ID: agent.ID, Services: []string{}, Entries: []admin.IdentityEntry{}, Agents: []admin.IdentityAgent{agent}},
	}, nil
}

// Identity is one of them.
func (f *Fake) Identity(ctx context.Context, id string) (admin.Identity, error) {
	all, _ := f.Identities(ctx)
	for _, i := range all {
		if i.ID == id || strings.HasSuffix(i.ID, "/ns/"+strings.Replace(id, "/", "/sa/", 1)) {
			return i, nil
		}
	}
	return admin.Identity{}, admin.NotFound("hanse identity list shows those that there are", "no entry, agent or endpoint has the ID %s", id)
}

// Mint signs nothing.
func (f *Fake) Mint(_ context.Context, req admin.MintRequest) (admin.Minted, error) {
	if len(req.Audience) > 0 {
		return admin.Minted{ID: "spiffe://west.demo/ns/shop/sa/payments", Token: "header.payload.signature", Expires: f.now().Add(5 * time.Minute)}, nil
	}
	return admin.Minted{ID: "spiffe://west.demo/ns/shop/sa/payments", Chain: [][]byte{[]byte("not a certificate")}, Bundle: json.RawMessage(`{}`), Expires: f.now().Add(time.Hour)}, nil
}

// TrustRemove removes one.
func (f *Fake) TrustRemove(_ context.Context, name string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	td, ok := f.trust[name]
	switch {
	case !ok:
		return admin.NotFound("hanse trust list lists them", "trust domain %s is not trusted", name)
	case td.Own:
		return admin.Refused("", "%s is this cluster's own trust domain", name)
	}
	delete(f.trust, name)
	return nil
}

// TrustRefresh refuses members, which have no endpoint.
func (f *Fake) TrustRefresh(ctx context.Context, name string) (admin.TrustDomain, error) {
	td, err := f.TrustShow(ctx, name)
	if err == nil && td.Source != "endpoint" {
		err = admin.Refused("members of the mesh push theirs within seconds", "%s has no bundle endpoint to ask", name)
	}
	return td, err
}

// TrustRotate waits for north, and then not any more.
func (f *Fake) TrustRotate(_ context.Context, req admin.RotateRequest, emit func(admin.Event) error) (admin.Rotation, error) {
	until := f.now().Add(2 * time.Hour)
	r := admin.Rotation{State: "waiting", Root: "1f2a33c4d5e6f708", Old: "9f3a004100000000", Sequence: 4, Missing: []string{"cluster north"},
		Deadline: f.now().Add(50 * time.Hour), Left: 180000}
	if req.ActivateNow && !req.Force {
		return r, admin.Refused("hanse trust rotate --activate-now --force", "the root is prepared, but one has not loaded it and would refuse what it signs: cluster north")
	}
	if !req.ActivateNow {
		ev, err := admin.DataEvent(r)
		if err == nil {
			err = emit(ev)
		}
		if err != nil {
			return r, err
		}
		r.Missing = []string{}
	}
	r.State, r.Elapsed, r.OldUntil, r.OldLeft, r.Forced = "active", 1.4, &until, 7200, req.Force
	return r, nil
}

// TrustDistrust hears from two proxies of three.
func (f *Fake) TrustDistrust(ctx context.Context, req admin.DistrustRequest, emit func(admin.Event) error) (admin.Distrusted, error) {
	td, err := f.TrustShow(ctx, req.What)
	if err != nil {
		return admin.Distrusted{}, err
	}
	if td.Own {
		return admin.Distrusted{}, admin.Refused("name one of its roots: hanse trust show", "%s is this cluster's own trust domain", td.Name)
	}
	d := admin.Distrusted{TrustDomain: td.Name, Closed: 2, HansedIn: 0.0012, Confirmed: 2, LastIn: 0.084, Missing: []string{"sidecar-3"}, Undone: req.Undo}
	ev, err := admin.DataEvent(d)
	if err == nil {
		err = emit(ev)
	}
	if td.Name == "east.demo" {
		d.Confirmed, d.Missing = 3, []string{}
	}
	return d, err
}

// Apply stores objects; one named "bad" is refused with a fault at its line.
func (f *Fake) Apply(_ context.Context, stream []byte, dryRun bool) ([]admin.Applied, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var applied []admin.Applied
	next := slices.Clone(f.objects)
	line := 1
	for _, doc := range strings.Split(string(stream), "\n---\n") {
		at := line
		line += strings.Count(doc, "\n") + 2
		j, err := yaml.YAMLToJSON([]byte(doc))
		if err != nil {
			return nil, admin.Invalid("", "%v", err)
		}
		var o struct {
			Kind     string
			Metadata struct{ Namespace, Name string }
		}
		if err := json.Unmarshal(j, &o); err != nil || o.Kind == "" {
			continue
		}
		obj := admin.Object{Kind: o.Kind, Namespace: o.Metadata.Namespace, Name: o.Metadata.Name, Source: "applied", Object: j}
		if obj.Name == "bad" {
			e := admin.Invalid("", "1 fault; nothing was applied")
			e.Faults = []admin.Fault{{Line: at + 1, Object: title(obj), Field: "metadata.name", Value: "bad", Reason: "this name is refused by the fake"}}
			return nil, e
		}
		i := slices.IndexFunc(next, func(x admin.Object) bool { return title(x) == title(obj) })
		switch {
		case i < 0:
			next = append(next, obj)
			applied = append(applied, admin.Applied{Object: title(obj), Action: "created"})
		case string(next[i].Object) == string(j):
			applied = append(applied, admin.Applied{Object: title(obj), Action: "unchanged"})
		default:
			next[i] = obj
			applied = append(applied, admin.Applied{Object: title(obj), Action: "configured"})
		}
	}
	if !dryRun {
		f.objects = next
	}
	return applied, nil
}

func title(o admin.Object) string {
	if o.Namespace == "" {
		return o.Kind + " " + o.Name
	}
	return o.Kind + " " + o.Namespace + "/" + o.Name
}

// ListObjects lists what was applied.
func (f *Fake) ListObjects(_ context.Context, kind, namespace, name string) ([]admin.Object, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var l []admin.Object
	for _, o := range f.objects {
		if (kind == "" || o.Kind == kind) && (namespace == "" || o.Namespace == namespace) && (name == "" || o.Name == name) {
			l = append(l, o)
		}
	}
	return l, nil
}

// DeleteObject deletes what was applied.
func (f *Fake) DeleteObject(_ context.Context, kind, namespace, name string) (admin.Applied, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	want := title(admin.Object{Kind: kind, Namespace: namespace, Name: name})
	for i, o := range f.objects {
		if title(o) == want {
			f.objects = slices.Delete(f.objects, i, i+1)
			return admin.Applied{Object: want, Action: "deleted"}, nil
		}
	}
	return admin.Applied{}, admin.NotFound("hanse get "+strings.ToLower(kind)+" lists what there is", "no %s", want)
}

// DrillPlan covers all but shop/ledger.
func (f *Fake) DrillPlan(_ context.Context, spec admin.DrillSpec) (admin.DrillPlan, error) {
	p := admin.DrillPlan{Spec: spec, Endpoints: 4, Covered: true, Summary: "Would black-hole 4 endpoints of shop/payments in west.",
		Guard:    "abort if success of any caller < 99% over 10s (default)",
		Services: []admin.DrillCovered{{Service: "shop/payments", Hit: 4, Left: 3, Takers: []string{"east (3 healthy)"}, Covered: true}}}
	if spec.Scope.Service == "" {
		p.Covered = false
		p.Services = append(p.Services, admin.DrillCovered{Service: "shop/ledger", Hit: 1, Note: "west only: callers will fail"})
	}
	return p, nil
}

// DrillRun takes no time, except in mode slow, which lasts until it is stopped.
func (f *Fake) DrillRun(ctx context.Context, spec admin.DrillSpec, emit func(admin.Event) error) (admin.Drill, error) {
	f.mu.Lock()
	d := &fakeDrill{stop: make(chan struct{}), Drill: admin.Drill{ID: fmt.Sprintf("d-7f%d", len(f.drills)+1), Cluster: "west", Spec: spec, State: "running",
		Started: f.now(), Success: 1, P99Before: 4.1, Elapsed: 0, Timeline: []admin.DrillMoment{{Kind: "started", Detail: "4 endpoints in west"}},
		Executors: []string{"payments-1", "payments-2"}}}
	f.drills = append(f.drills, d)
	snapshot := d.Drill
	f.mu.Unlock()
	e, err := admin.DrillEvent(snapshot)
	if err != nil {
		return admin.Drill{}, err
	}
	if err := emit(e); err != nil {
		return admin.Drill{}, err
	}
	stopped := false
	if spec.Mode == "slow" {
		select {
		case <-d.stop:
			stopped = true
		case <-ctx.Done():
			return admin.Drill{}, ctx.Err()
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	d.State, d.Verdict = "done", "PASSED"
	if stopped {
		d.State = "stopped"
	}
	if spec.Mode == "errors" {
		d.State, d.Verdict, d.Reason, d.Failed = "aborted", "FAILED", "success of shop/frontend was 91.2%, below 99%", 88
	}
	d.Elapsed, d.Ended = spec.For, ptr(d.Started.Add(time.Minute))
	d.Detect, d.Shift, d.Return = ptr(0.9), ptr(1.3), ptr(4.2)
	d.Calls, d.Retried, d.Success = 18204, 31, 1-float64(d.Failed)/18204
	d.P50Before, d.P50During, d.P99During = 1.1, 2.3, 9.8
	d.Traffic = []admin.DrillShare{{Service: "shop/payments", Cluster: "west", Zone: "eu-1a", Before: 1, After: 1}, {Service: "shop/payments", Cluster: "east", During: 1}}
	d.Timeline = append(d.Timeline, admin.DrillMoment{At: 0.9, Kind: "first_failure", Detail: "west/a1 timed out"}, admin.DrillMoment{At: 1.3, Kind: "shifted", Detail: "to east"})
	d.Missing = []string{"catalog-1"}
	return d.Drill, nil
}

// DrillList is newest first.
func (f *Fake) DrillList(context.Context) ([]admin.Drill, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var l []admin.Drill
	for _, d := range slices.Backward(f.drills) {
		l = append(l, d.Drill)
	}
	return l, nil
}

func (f *Fake) find(id string) (*fakeDrill, error) {
	for _, d := range f.drills {
		if d.ID == id {
			return d, nil
		}
	}
	return nil, admin.NotFound("hanse drill status lists them", "no drill %q", id)
}

// DrillGet returns one.
func (f *Fake) DrillGet(_ context.Context, id string) (admin.Drill, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	d, err := f.find(id)
	if err != nil {
		return admin.Drill{}, err
	}
	return d.Drill, nil
}

// DrillStop stops one.
func (f *Fake) DrillStop(_ context.Context, id string) (admin.Drill, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	d, err := f.find(id)
	if err != nil {
		return admin.Drill{}, err
	}
	if d.State == "running" {
		d.State = "healing"
		close(d.stop)
	}
	return d.Drill, nil
}
