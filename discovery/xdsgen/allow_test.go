package xdsgen

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/hanse-mesh/hanse/discovery"
)

// TestAllow holds sidecars to spec.allow, also of endpoints that the import let in: they are no endpoints, and their ID is none of the
// service's.
func TestAllow(t *testing.T) {
	payments, other := "spiffe://east.demo/ns/shop/sa/payments", "spiffe://east.demo/ns/shop/sa/other"
	ports := []discovery.Port{{Name: "http", Number: 8080, Protocol: discovery.HTTP}}
	endpoint := func(id, spiffeID string) *discovery.Endpoint {
		return &discovery.Endpoint{
			ID:      id,
			Address: netip.MustParseAddr("10.2.0.1"),
			Profile: &discovery.Profile{Ports: map[string]uint16{"http": 9000}, Transport: discovery.Hop, SPIFFEID: spiffeID, Network: "flat", Locality: discovery.Locality{Cluster: "east"}},
			Ready:   true,
		}
	}
	name := discovery.Name{Namespace: "shop", Name: "payments"}
	for _, c := range []struct {
		name  string
		allow []discovery.Allow
		ids   string // by which endpoints are used
	}{
		{"without rules", nil, "a b"},
		{"any service", []discovery.Allow{{SPIFFEIDs: []string{payments}}}, "a"},
		{"this service", []discovery.Allow{{Services: []string{"shop/*"}, SPIFFEIDs: []string{payments}}}, "a"},
		{"two rules", []discovery.Allow{{Services: []string{"*/payments"}, SPIFFEIDs: []string{other}}, {SPIFFEIDs: []string{payments}}}, "a b"},
		{"another service's", []discovery.Allow{{Services: []string{"shop/catalog"}, SPIFFEIDs: []string{"spiffe://east.demo/**"}}}, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			v := NewView(&discovery.Clusterset{
				Local: &discovery.Snapshot{
					Self:         discovery.Self{Cluster: "west", TrustDomain: "west.demo", Network: "flat"},
					TrustDomains: []*discovery.FederatedTrustDomain{{TrustDomain: "east.demo", Allow: c.allow}},
				},
				Imports: discovery.NewByName(map[discovery.Name]*discovery.Import{name: {Name: name, Ports: ports, From: []discovery.ImportedFrom{
					{Member: "east", Ports: ports, Endpoints: []*discovery.Endpoint{endpoint("a", payments), endpoint("b", other)}, Withheld: 3},
				}}}),
				Members: map[string]*discovery.Member{"east": {Name: "east", State: discovery.Fresh}},
				Trusted: map[string]uint64{"west.demo": 1, "east.demo": 1},
			}, nil)
			viewer := &Viewer{Cluster: "west", Network: "flat", Kind: Sidecar}
			levels, err := v.Levels(viewer, name.Host()+":8080")
			if err != nil {
				t.Fatal(err)
			}
			var used []string
			for _, l := range levels.Levels {
				for _, e := range l.Endpoints {
					used = append(used, e.ID)
				}
			}
			if got := strings.Join(used, " "); got != c.ids {
				t.Errorf("endpoints %q are used, want %q", got, c.ids)
			}
			reasons := ""
			for _, o := range levels.Omitted {
				reasons += o.ID + ": " + o.Reason + "\n"
			}
			if !strings.Contains(reasons, "3 of its endpoints have SPIFFE IDs that may not serve shop/payments here") {
				t.Errorf("what was not imported is not said: %s", reasons)
			}
			if c.ids == "a" && !strings.Contains(reasons, "b: "+other+" may not serve shop/payments here") {
				t.Errorf("no reason for b: %s", reasons)
			}
			callee, err := v.lookup(name.Host() + ":8080")
			if err != nil {
				t.Fatal(err)
			}
			tls, err := v.upstreamTLS(viewer, callee)
			if err != nil {
				t.Fatal(err)
			}
			for id, endpoint := range map[string]string{payments: "a", other: "b"} {
				if got, want := strings.Contains(tls.String(), id), strings.Contains(c.ids, endpoint); got != want {
					t.Errorf("%s accepted: %v, want %v", id, got, want)
				}
			}
		})
	}
}
