package xdsclient

import (
	"encoding/json"
	"path/filepath"
	"strings"
	"testing"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/rbac/v3" // Anys in the goldens
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/rbac/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"github.com/rogpeppe/go-internal/txtar"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/hanse-mesh/hanse/discovery/xdspb"
)

// golden is a resource that xdsgen makes for a sidecar or gateway.
type golden struct {
	sample
	file    string
	gateway bool
}

// goldens reads what xdsgen's goldens hold, without what is for gRPC.
func goldens(t testing.TB) (out []golden) {
	t.Helper()
	files, err := filepath.Glob("../../discovery/xdsgen/testdata/*.txtar")
	if err != nil || len(files) == 0 {
		t.Fatalf("no goldens of xdsgen: %v", err)
	}
	for _, file := range files {
		ar, err := txtar.ParseFile(file)
		if err != nil {
			t.Fatal(err)
		}
		var viewers map[string]struct {
			Kind string `json:"kind"`
		}
		var want string
		for _, f := range ar.Files {
			switch f.Name {
			case "viewers.json":
				if err := json.Unmarshal(f.Data, &viewers); err != nil {
					t.Fatal(err)
				}
			case "want":
				want = string(f.Data)
			}
		}
		for part := range strings.SplitSeq("\n"+want, "\n# ") {
			query, body, _ := strings.Cut(part, "\n")
			f := strings.Fields(query)
			if len(f) == 2 && f[0] == "gateway" {
				out = append(out, gatewayGoldens(t, file, body)...)
			}
			if len(f) != 3 || viewers[f[0]].Kind != "sidecar" || !strings.HasPrefix(body, "{") {
				continue
			}
			g := golden{file: filepath.Base(file) + ": " + query, sample: sample{name: f[2]}}
			switch f[1] {
			case "Listener":
				g.typeURL, g.m = listenerType, &listenerv3.Listener{}
			case "Cluster":
				g.typeURL, g.m = clusterType, &clusterv3.Cluster{}
			case "ClusterLoadAssignment":
				g.typeURL, g.m = endpointType, &endpointv3.ClusterLoadAssignment{}
			case "Service":
				g.typeURL, g.m = serviceType, &xdspb.Service{}
			default:
				continue
			}
			fromJSON(t, g.file, []byte(body), g.m)
			out = append(out, g)
		}
	}
	return out
}

func gatewayGoldens(t testing.TB, file, body string) (out []golden) {
	for d := json.NewDecoder(strings.NewReader(body)); d.More(); {
		var raw json.RawMessage
		if d.Decode(&raw) != nil {
			break // "nothing"
		}
		m := &endpointv3.ClusterLoadAssignment{}
		fromJSON(t, file, raw, m)
		out = append(out, golden{sample{endpointType, m.ClusterName, m}, filepath.Base(file) + ": gateway " + m.ClusterName, true})
	}
	return out
}

func fromJSON(t testing.TB, what string, raw []byte, m proto.Message) {
	t.Helper()
	if err := protojson.Unmarshal(raw, m); err != nil {
		t.Fatalf("%s: %v", what, err)
	}
}

// TestGoldensOfTheControlPlane: what xdsgen makes for our proxies is understood.
func TestGoldensOfTheControlPlane(t *testing.T) {
	types := map[string]int{}
	for _, g := range goldens(t) {
		types[g.typeURL]++
		if _, err := decode(g.typeURL, g.name, packed(t, g.m), g.gateway); err != nil {
			t.Errorf("%s: %v", g.file, err)
		}
	}
	if types[listenerType] < 3 || types[endpointType] < 3 {
		t.Errorf("hardly any goldens: %v", types)
	}
}
