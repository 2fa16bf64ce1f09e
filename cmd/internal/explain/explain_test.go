package explain

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/hanse-mesh/hanse/cmd/internal/admin"
	"github.com/hanse-mesh/hanse/discovery"
	"github.com/hanse-mesh/hanse/discovery/xdsgen"
)

var payments = discovery.Name{Namespace: "shop", Name: "payments"}

func endpoint(id, cluster, zone, ip string) *discovery.Endpoint {
	return &discovery.Endpoint{
		ID:      strings.Repeat(id, 16),
		Address: netip.MustParseAddr(ip),
		Profile: &discovery.Profile{Ports: map[string]uint16{"http": 8080}, Transport: discovery.Hop, SPIFFEID: "spiffe://" + cluster + ".demo/ns/shop/sa/payments", Network: cluster, Locality: discovery.Locality{Cluster: cluster, Region: "eu-1", Zone: zone}},
		Ready:   true,
	}
}

// mesh is west and east, both with payments, seen from west.
func mesh() *discovery.Clusterset {
	port := []discovery.Port{{Name: "http", Number: 8080, Protocol: discovery.HTTP}}
	west := &discovery.Service{Name: payments, Ports: port, Export: &discovery.Export{},
		Endpoints: []*discovery.Endpoint{endpoint("a1", "west", "eu-1a", "127.0.1.11"), endpoint("b1", "west", "eu-1b", "127.0.1.12")}}
	return &discovery.Clusterset{
		Local: &discovery.Snapshot{Self: discovery.Self{Cluster: "west", TrustDomain: "west.demo", Network: "west", Region: "eu-1"},
			Services: discovery.NewByName(map[discovery.Name]*discovery.Service{payments: west})},
		Imports: discovery.NewByName(map[discovery.Name]*discovery.Import{payments: {Name: payments, Ports: port, From: []discovery.ImportedFrom{
			{Member: "west", Ports: port, Endpoints: west.Endpoints},
			{Member: "east", Ports: port, Endpoints: []*discovery.Endpoint{endpoint("e1", "east", "eu-1a", "127.0.2.11")}},
		}}}),
		Members: map[string]*discovery.Member{"east": {Name: "east", TrustDomain: "east.demo", Network: "east", Region: "eu-1", State: discovery.Fresh,
			Gateways: []netip.AddrPort{netip.MustParseAddrPort("127.0.2.9:15443")}}},
		Trusted: map[string]uint64{"west.demo": 1, "east.demo": 4},
	}
}

func frontend() Caller {
	return Caller{Config: "version 3 (current)", Viewer: xdsgen.Viewer{ID: "p1", Cluster: "west", Namespace: "shop", Region: "eu-1", Zone: "eu-1a", Network: "west",
		Kind: xdsgen.Sidecar, SPIFFEID: "spiffe://west.demo/ns/shop/sa/frontend"}}
}

func explain(t *testing.T, set *discovery.Clusterset, req admin.ExplainRequest, health map[string]string) admin.Explanation {
	t.Helper()
	e, err := Explain(Input{View: xdsgen.NewView(set, nil), Request: req, Callers: []Caller{frontend()}, Now: time.Unix(1000, 0),
		Health:  func(_, _, id string) Health { return Health{State: health[id[:2]]} },
		Gateway: func(string) string { return "up" }})
	if err != nil {
		t.Fatal(err)
	}
	return e
}

func TestExplain(t *testing.T) {
	call := admin.ExplainRequest{From: "frontend", To: "payments"}
	for _, c := range []struct {
		name   string
		req    admin.ExplainRequest
		change func(*discovery.Clusterset)
		health map[string]string
		ok     bool
		want   string
	}{
		{name: "own zone", req: call, ok: true, want: "goes to west, zone eu-1a, 1 of 1 endpoints healthy"},
		{name: "own zone dead", req: call, health: map[string]string{"a1": "ejected"}, ok: true, want: "goes to west, zone eu-1b"},
		{name: "own cluster dead", req: call, health: map[string]string{"a1": "dead", "b1": "dead"}, ok: true, want: "goes to east"},
		{name: "all dead", req: call, health: map[string]string{"a1": "dead", "b1": "dead", "e1": "dead"}, want: "none of the endpoints of shop/payments is healthy"},
		{name: "unknown service", req: admin.ExplainRequest{From: "frontend", To: "ledger"}, want: "no cluster exports shop/ledger"},
		{name: "no such port", req: admin.ExplainRequest{From: "shop/frontend", To: "payments.shop:9"}, want: "has no port 9"},
		{name: "untrusted", req: call, change: func(s *discovery.Clusterset) {
			delete(s.Trusted, "east.demo")
			s.Local.Services = s.Local.Services.Delete(payments)
			s.Imports.Get(payments).From = s.Imports.Get(payments).From[1:]
		}, want: "trust domain east.demo is not trusted here"},
		{name: "refused", req: call, change: func(s *discovery.Clusterset) {
			s.Local.Access = []*discovery.AccessPolicy{{Name: payments, Services: []discovery.Name{payments},
				Rules: []discovery.AccessRule{{From: []string{"spiffe://west.demo/ns/shop/sa/admin"}}}}}
		}, want: "west refuses this caller"},
	} {
		t.Run(c.name, func(t *testing.T) {
			set := mesh()
			if c.change != nil {
				c.change(set)
			}
			e := explain(t, set, c.req, c.health)
			if e.OK != c.ok || !strings.Contains(e.Summary, c.want) {
				t.Errorf("ok=%v %q\nwant ok=%v …%s…\n%+v", e.OK, e.Summary, c.ok, c.want, e)
			}
			if !e.OK && e.Remedy == "" {
				t.Error("a failure without a remedy")
			}
		})
	}
}

func TestExplainTellsTheGatewayAndTheShare(t *testing.T) {
	e := explain(t, mesh(), admin.ExplainRequest{From: "frontend", To: "payments.shop:8080"}, nil)
	var far *admin.ExplainLevel
	var sum float64
	for i := range e.Levels {
		sum += e.Levels[i].Share
		if e.Levels[i].Cluster == "east" {
			far = &e.Levels[i]
		}
	}
	if far == nil || far.Note != "through east's gateways 127.0.2.9:15443 (up)" || far.Share != 0 {
		t.Errorf("east's level: %+v", far)
	}
	if sum < 0.999 || sum > 1.001 {
		t.Errorf("shares add up to %v", sum)
	}
}

func TestExplainCallerOfNowhere(t *testing.T) {
	_, err := Explain(Input{View: xdsgen.NewView(mesh(), nil), Request: admin.ExplainRequest{From: "nobody", To: "payments"}, Now: time.Unix(0, 0)})
	if err == nil || !strings.Contains(err.Error(), `no sidecar of a workload "nobody"`) {
		t.Errorf("err = %v", err)
	}
}
