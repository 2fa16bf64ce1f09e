package xdsgen

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/rogpeppe/go-internal/txtar"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/hanse-mesh/hanse/discovery"
)

var update = flag.Bool("update", false, "rewrite the goldens in testdata")

// input is a Clusterset as testdata writes it.
type input struct {
	Self            discovery.Self
	Services        []*discovery.Service
	Routes          []*discovery.Route
	TrafficPolicies []*discovery.TrafficPolicy
	Access          []*discovery.AccessPolicy
	Imports         []*discovery.Import
	Members         []*discovery.Member
	Trusted         map[string]uint64
	ClustersetIPs   map[netip.Addr]discovery.Name
	Callers         []struct {
		Service discovery.Name
		discovery.Locality
		Count int
	}
}

func (in *input) view() *View {
	set := &discovery.Clusterset{
		Local: &discovery.Snapshot{
			Self: in.Self, Complete: true, Routes: in.Routes, Access: in.Access, ClustersetIPs: in.ClustersetIPs,
			TrafficPolicy: make(map[discovery.Name]*discovery.TrafficPolicy),
		},
		Members: make(map[string]*discovery.Member),
		Trusted: in.Trusted,
	}
	for _, s := range in.Services {
		set.Local.Services = set.Local.Services.Put(s.Name, s)
	}
	for _, p := range in.TrafficPolicies {
		set.Local.TrafficPolicy[p.Service] = p
	}
	for _, i := range in.Imports {
		set.Imports = set.Imports.Put(i.Name, i)
	}
	for _, m := range in.Members {
		set.Members[m.Name] = m
	}
	callers := make(Callers)
	for _, c := range in.Callers {
		if callers[c.Service] == nil {
			callers[c.Service] = make(map[discovery.Locality]int)
		}
		callers[c.Service][c.Locality] = c.Count
	}
	return NewView(set, callers)
}

// TestGolden reads each testdata/*.txtar: set.json is the Clusterset, viewers.json the viewers by name, queries one query a
// line; want is what came out.
func TestGolden(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txtar")
	if err != nil || len(files) == 0 {
		t.Fatalf("no goldens: %v", err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txtar"), func(t *testing.T) {
			ar, err := txtar.ParseFile(file)
			if err != nil {
				t.Fatal(err)
			}
			var in input
			viewers := make(map[string]*Viewer)
			var queries string
			want := -1
			for i, f := range ar.Files {
				switch f.Name {
				case "set.json":
					strictJSON(t, f.Data, &in)
				case "viewers.json":
					strictJSON(t, f.Data, &viewers)
				case "queries":
					queries = string(f.Data)
				case "want":
					want = i
				default:
					t.Fatalf("unknown section %q", f.Name)
				}
			}
			got := answer(t, in.view(), viewers, queries)
			if *update {
				if want < 0 {
					ar.Files = append(ar.Files, txtar.File{Name: "want"})
					want = len(ar.Files) - 1
				}
				ar.Files[want].Data = got
				if err := os.WriteFile(file, txtar.Format(ar), 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			if want < 0 {
				t.Fatal("no want: run with -update")
			}
			if d := cmp.Diff(string(ar.Files[want].Data), string(got)); d != "" {
				t.Errorf("run with -update, and read the diff:\n%s", d)
			}
		})
	}
}

func strictJSON(t *testing.T, data []byte, into any) {
	t.Helper()
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	if err := d.Decode(into); err != nil {
		t.Fatal(err)
	}
}

// answer runs the queries: "VIEWER TYPE NAME" makes a resource, "levels VIEWER NAME" and "routes VIEWER NAME" explain,
// "gateway NAMESPACE/SERVICE" lists a gateway's table.
func answer(t *testing.T, v *View, viewers map[string]*Viewer, queries string) []byte {
	t.Helper()
	var out bytes.Buffer
	for line := range strings.Lines(queries) {
		line = strings.TrimSpace(line)
		f := strings.Fields(line)
		if len(f) == 0 {
			continue
		}
		fmt.Fprintf(&out, "# %s\n", line)
		switch f[0] {
		case "levels":
			l, err := v.Levels(viewers[f[1]], f[2])
			explained(&out, l, err)
		case "routes":
			r, err := v.Routes(viewers[f[1]], f[2])
			explained(&out, r, err)
		case "gateway":
			ns, name, _ := strings.Cut(f[1], "/")
			table, err := v.GatewayResources(discovery.Name{Namespace: ns, Name: name})
			if err != nil {
				t.Fatal(err)
			}
			for _, r := range table {
				fmt.Fprintf(&out, "%s\n", indented(t, r))
			}
			if len(table) == 0 {
				out.WriteString("nothing\n")
			}
		default:
			r, err := v.Resource(viewers[f[0]], typeURL(f[1]), f[2])
			switch {
			case err != nil:
				fmt.Fprintf(&out, "error: %v\n", err)
			case r == nil:
				out.WriteString("nothing\n")
			default:
				fmt.Fprintf(&out, "%s\n", indented(t, r))
			}
		}
	}
	return out.Bytes()
}

func typeURL(short string) string {
	for _, u := range []string{ListenerType, RouteType, ClusterType, EndpointType, ServiceType} {
		if strings.HasSuffix(u, "."+short) {
			return u
		}
	}
	return short
}

func explained(out *bytes.Buffer, m any, err error) {
	if err != nil {
		fmt.Fprintf(out, "error: %v\n", err)
		return
	}
	b, _ := json.MarshalIndent(m, "", "  ")
	fmt.Fprintf(out, "%s\n", b)
}

// indented writes a resource as JSON, after it has passed Envoy's own constraints.
func indented(t *testing.T, r *Resource) []byte {
	t.Helper()
	m, err := r.Any.UnmarshalNew()
	if err != nil {
		t.Fatal(err)
	}
	validate(t, r.Name, m)
	b, err := protojson.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	var plain any
	if err := json.Unmarshal(b, &plain); err != nil {
		t.Fatal(err)
	}
	b, _ = json.MarshalIndent(plain, "", "  ")
	return b
}

// validate applies the constraints of Envoy's .proto files, also within Anys.
func validate(t *testing.T, name string, m proto.Message) {
	t.Helper()
	if v, ok := m.(interface{ ValidateAll() error }); ok {
		if err := v.ValidateAll(); err != nil {
			t.Errorf("%s: Envoy refuses it: %v", name, err)
		}
	}
	var walk func(protoreflect.Message)
	value := func(fd protoreflect.FieldDescriptor, v protoreflect.Value) {
		if fd.Message() == nil {
			return
		}
		if a, ok := v.Message().Interface().(*anypb.Any); ok {
			inner, err := a.UnmarshalNew()
			if err != nil {
				t.Errorf("%s: %v", name, err)
				return
			}
			validate(t, name, inner)
			return
		}
		walk(v.Message())
	}
	walk = func(m protoreflect.Message) {
		m.Range(func(fd protoreflect.FieldDescriptor, v protoreflect.Value) bool {
			switch {
			case fd.IsMap():
				v.Map().Range(func(_ protoreflect.MapKey, e protoreflect.Value) bool {
					value(fd.MapValue(), e)
					return true
				})
			case fd.IsList():
				for i := range v.List().Len() {
					value(fd, v.List().Get(i))
				}
			default:
				value(fd, v)
			}
			return true
		})
	}
	walk(m.ProtoReflect())
}
