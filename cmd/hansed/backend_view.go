package main

import (
	"cmp"
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/hanse-mesh/hanse/cmd/internal/admin"
	"github.com/hanse-mesh/hanse/cmd/internal/explain"
	"github.com/hanse-mesh/hanse/discovery"
	"github.com/hanse-mesh/hanse/discovery/xdsserver"
)

// self is what people see as the state of their own cluster.
const self = "self"

// Services lists this cluster's services and those that it imports.
func (p *controlPlane) Services(context.Context) ([]admin.Service, error) {
	set, ages := p.mesh.Clusterset(), p.seenAges()
	rows := map[discovery.Name]*admin.Service{}
	row := func(n discovery.Name, ports []discovery.Port) *admin.Service {
		if rows[n] == nil {
			rows[n] = &admin.Service{Namespace: n.Namespace, Name: n.Name, Host: n.Host(), Ports: ports}
		}
		return rows[n]
	}
	for n, imp := range set.Imports.All() {
		r := row(n, imp.Ports)
		for _, from := range imp.From {
			r.Clusters = append(r.Clusters, part(set, ages, from))
		}
		for _, c := range imp.Conflicts {
			r.Conflicts = append(r.Conflicts, fmt.Sprintf("%s: %s: %s", c.Member, c.Reason, c.Message))
		}
	}
	for n, svc := range set.Local.Services.All() {
		r := row(n, svc.Ports)
		if r.Exported = svc.Export != nil; r.Exported {
			r.Unexported = svc.WithoutIdentity()
		}
		if svc.Export == nil {
			r.Clusters = append(r.Clusters, part(set, ages, discovery.ImportedFrom{Member: set.Local.Self.Cluster, Endpoints: svc.Endpoints}))
		}
	}
	out := make([]admin.Service, 0, len(rows))
	for _, r := range rows {
		slices.SortFunc(r.Clusters, func(a, b admin.ServicePart) int {
			return cmp.Or(-cmp.Compare(b2i(a.State == self), b2i(b.State == self)), cmp.Compare(a.Cluster, b.Cluster))
		})
		out = append(out, *r)
	}
	slices.SortFunc(out, func(a, b admin.Service) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
	})
	return out, nil
}

func b2i(b bool) int {
	if b {
		return 1
	}
	return 0
}

func part(set *discovery.Clusterset, ages map[string]float64, from discovery.ImportedFrom) admin.ServicePart {
	part := admin.ServicePart{Cluster: from.Member, Total: len(from.Endpoints), Revision: from.Revision, State: stateOf(set, from.Member)}
	for _, e := range from.Endpoints {
		if e.Ready && !e.Draining {
			part.Ready++
		}
	}
	if age, ok := ages[from.Member]; ok {
		part.Age = &age
	}
	return part
}

func stateOf(set *discovery.Clusterset, cluster string) string {
	if cluster == set.Local.Self.Cluster {
		return self
	}
	if m := set.Members[cluster]; m != nil {
		return string(m.State)
	}
	return "unknown"
}

// Endpoints lists the endpoints of a service in every cluster.
func (p *controlPlane) Endpoints(_ context.Context, service string) ([]admin.Endpoint, error) {
	set := p.mesh.Clusterset()
	name, err := findService(set, service)
	if err != nil {
		return nil, err
	}
	imp, svc := set.Imports.Get(name), set.Local.Services.Get(name)
	var parts []discovery.ImportedFrom
	var authorities []string
	if imp != nil {
		parts = slices.Clone(imp.From)
		for _, port := range imp.Ports {
			authorities = append(authorities, name.Authority(port.Number))
		}
	}
	if svc != nil {
		if svc.Export == nil {
			parts = append(parts, discovery.ImportedFrom{Member: set.Local.Self.Cluster, Endpoints: svc.Endpoints})
		}
		for _, port := range svc.Ports {
			authorities = append(authorities, name.Authority(port.Number))
		}
	}
	out := []admin.Endpoint{}
	ages := p.seenAges()
	for _, from := range parts {
		for _, e := range from.Endpoints {
			out = append(out, admin.Endpoint{
				ID: e.ID, Cluster: from.Member, Region: e.Locality.Region, Zone: e.Locality.Zone, Address: address(e), Network: e.Network,
				Ready: e.Ready, Draining: e.Draining, State: stateOf(set, from.Member), Health: p.health.Worst(e.ID, authorities),
				SPIFFEID: e.SPIFFEID, Transport: string(e.Transport), Revision: from.Revision, SeenAge: ages[from.Member],
			})
		}
	}
	slices.SortStableFunc(out, func(a, b admin.Endpoint) int {
		return cmp.Or(-cmp.Compare(b2i(a.State == self), b2i(b.State == self)), cmp.Compare(a.Cluster, b.Cluster), cmp.Compare(a.Zone, b.Zone), cmp.Compare(a.Address, b.Address))
	})
	return out, nil
}

// address is where an endpoint is dialled: its hop, or the workload itself, whose port depends on the service's.
func address(e *discovery.Endpoint) string {
	if e.Transport == discovery.Hop {
		return e.DialAddress("").String()
	}
	return e.Address.String()
}

// findService reads "namespace/name", "name.namespace…" or, where it is the only one of that name, "name".
func findService(set *discovery.Clusterset, s string) (discovery.Name, error) {
	known := func(n discovery.Name) bool { return set.Imports.Get(n) != nil || set.Local.Services.Get(n) != nil }
	if ns, name, ok := strings.Cut(s, "/"); ok {
		n := discovery.Name{Namespace: ns, Name: name}
		if known(n) {
			return n, nil
		}
		if ns != "default" {
			return n, admin.NotFound("hanse services lists all of them", "there is no service %s", s)
		}
		s = name
	} else if n, _, _, ok := discovery.ParseAuthority(s); ok && known(n) {
		return n, nil
	}
	var found []discovery.Name
	for n := range set.Imports.All() {
		if n.Name == s {
			found = append(found, n)
		}
	}
	for n := range set.Local.Services.All() {
		if n.Name == s && !slices.Contains(found, n) {
			found = append(found, n)
		}
	}
	switch len(found) {
	case 0:
		return discovery.Name{}, admin.NotFound("hanse services lists all of them", "there is no service %s", s)
	case 1:
		return found[0], nil
	}
	return discovery.Name{}, admin.Invalid("name it as namespace/name", "%q is a service of %d namespaces", s, len(found))
}

// Proxies lists who is connected to the xDS port.
func (p *controlPlane) Proxies(context.Context) ([]admin.Proxy, error) {
	now := p.now()
	sequences := p.bundles.Sequences()
	out := []admin.Proxy{}
	for _, s := range p.proxies() {
		row := admin.Proxy{ID: s.Viewer.ID, SPIFFEID: s.Viewer.SPIFFEID, Role: s.Role, Region: s.Viewer.Region, Zone: s.Viewer.Zone,
			Connected: now.Sub(s.Connected).Seconds(), Version: s.Version, State: "current", TrustAcked: true}
		var acked time.Time
		for _, t := range s.Types {
			short := t.TypeURL[strings.LastIndexByte(t.TypeURL, '.')+1:]
			row.Resources = append(row.Resources, admin.ProxyConfig{Type: short, Names: t.Names, Sent: t.Sent, Acked: t.Acked, NACK: t.NACK})
			switch {
			case t.NACK != "":
				row.State = "nacked"
			case t.Sent != t.Acked && row.State == "current":
				row.State = "behind"
			}
			if t.AckedAt.After(acked) {
				acked = t.AckedAt
			}
		}
		if !acked.IsZero() {
			row.ConfigAge = now.Sub(acked).Seconds()
		}
		for td, seq := range sequences {
			if s.Trust[td.Name()] < seq && s.Role != "grpc" {
				row.TrustAcked = false
			}
		}
		out = append(out, row)
	}
	return out, nil
}

// Explain says how a call would go.
func (p *controlPlane) Explain(_ context.Context, req admin.ExplainRequest) (admin.Explanation, error) {
	now := p.now()
	var callers []explain.Caller
	for _, s := range p.proxies() {
		if s.Role == "gateway" {
			continue
		}
		callers = append(callers, explain.Caller{Viewer: s.Viewer, Config: configText(s, now), Problem: nackText(s)})
	}
	in := explain.Input{View: p.xds.View(), Request: req, Callers: callers, Now: now,
		Health:  p.health.Of,
		Gateway: p.gatewayState,
	}
	return explain.Explain(in)
}

func configText(s xdsserver.ProxyStatus, now time.Time) string {
	state, at := "current", time.Time{}
	for _, t := range s.Types {
		if t.Sent != t.Acked {
			state = "behind: " + t.TypeURL[strings.LastIndexByte(t.TypeURL, '.')+1:] + " " + t.Sent + " is not acknowledged"
		}
		if t.AckedAt.After(at) {
			at = t.AckedAt
		}
	}
	if at.IsZero() {
		return "no configuration acknowledged yet"
	}
	return fmt.Sprintf("configuration %s, acknowledged %s ago", state, now.Sub(at).Round(time.Second))
}

func nackText(s xdsserver.ProxyStatus) string {
	for _, t := range s.Types {
		if t.NACK != "" {
			return fmt.Sprintf("it rejected a %s and keeps the last good one: %s", t.TypeURL[strings.LastIndexByte(t.TypeURL, '.')+1:], t.NACK)
		}
	}
	return ""
}

// gatewayState is what the probes know of a gateway address.
func (p *controlPlane) gatewayState(addr string) string {
	a, err := netip.ParseAddrPort(addr)
	if err != nil {
		return ""
	}
	return p.probeState(a)
}

// Apply stores configuration.
func (p *controlPlane) Apply(ctx context.Context, yaml []byte, dryRun bool) ([]admin.Applied, error) {
	return p.catalog.Apply(ctx, yaml, dryRun)
}

// ListObjects lists configuration.
func (p *controlPlane) ListObjects(_ context.Context, kind, namespace, name string) ([]admin.Object, error) {
	return p.catalog.List(kind, namespace, name)
}

// DeleteObject removes applied configuration.
func (p *controlPlane) DeleteObject(ctx context.Context, kind, namespace, name string) (admin.Applied, error) {
	return p.catalog.Delete(ctx, kind, namespace, name)
}
