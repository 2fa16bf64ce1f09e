package objects

import (
	"bytes"
	"fmt"
	"strings"
	"testing"

	"github.com/hashicorp/go-multierror"
)

func wantFault(t *testing.T, err error, parts ...string) {
	t.Helper()
	if err == nil {
		t.Fatal("no fault")
	}
	for _, p := range parts {
		if !strings.Contains(err.Error(), p) {
			t.Errorf("fault %q does not say %q", err, p)
		}
	}
}

func TestMillionEndpointsInASlice(t *testing.T) {
	head := strings.TrimSuffix(slice("a", "a"), "\n")
	// Small enough to be read: too many endpoints.
	_, err := Decode([]byte(head+"\n"+strings.Repeat("- {}\n", 70_000)), "big.yaml")
	wantFault(t, err, "big.yaml:9: EndpointSlice shop/a: endpoints: ", "70000 entries; at most 65536", "split it")
	// Refused before it is parsed.
	_, err = Decode([]byte(head+"\n"+strings.Repeat("- {}\n", 1_000_000)), "big.yaml")
	wantFault(t, err, "big.yaml: more than 1000000 lines", "at most 65536 endpoints")
	_, err = Read(strings.NewReader(head+"\n"+strings.Repeat("- {addresses: [10.0.0.1]}\n", 1_000_000)), "big.yaml")
	wantFault(t, err, "big.yaml: larger than 16 MiB", "at most 65536 endpoints")
}

// Aliases cannot blow up a small file ("billion laughs").
func TestAliasesAreBounded(t *testing.T) {
	var b strings.Builder
	b.WriteString("apiVersion: v1\nkind: Service\nmetadata:\n  name: a\n  ownerReferences:\n  - &a0 {name: x}\n")
	text := b.String() + "spec:\n  ports:\n"
	prev := "{name: x, port: 1}"
	for i := range 8 {
		text += fmt.Sprintf("  - &l%d [%s]\n", i, strings.TrimSuffix(strings.Repeat(prev+", ", 10), ", "))
		prev = fmt.Sprintf("*l%d", i)
	}
	if _, err := Decode([]byte(text), "f.yaml"); err == nil {
		t.Error("no fault")
	}
	// The same in a field that any depth may have.
	text = "apiVersion: v1\nkind: Service\nx0: &x0 {a: b}\n"
	for i := range 9 {
		text += fmt.Sprintf("x%d: &x%d {%s}\n", i+1, i+1, strings.TrimSuffix(strings.Repeat(fmt.Sprintf("<<: *x%d, ", i), 10), ", "))
	}
	text += "metadata: {name: a, annotations: {<<: *x9}}\nspec: {ports: [{port: 1}]}\n"
	wantFault(t, func() error { _, err := Decode([]byte(text), "f.yaml"); return err }(), "unknown field")
}

func TestDeepNestingIsRefused(t *testing.T) {
	deep := strings.Repeat("[", 5000) + strings.Repeat("]", 5000)
	_, err := Decode([]byte("apiVersion: v1\nkind: Service\nmetadata: {name: a}\nspec: {ports: "+deep+"}\n"), "f.yaml")
	wantFault(t, err, "must be a mapping, not a list")
}

func TestFaultsAreOneMultierror(t *testing.T) {
	_, err := Decode([]byte("a: b\n---\nc: d\n"), "f.yaml")
	merr, ok := err.(*multierror.Error)
	if !ok || len(merr.Errors) != 2 || len(Faults(err)) != 2 {
		t.Fatalf("%T %v", err, err)
	}
	if got, want := err.Error(), "f.yaml:1: apiVersion: must be given, as text\nf.yaml:3: apiVersion: must be given, as text"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if f := Faults(bytes.ErrTooLarge); len(f) != 1 || f[0].Reason != bytes.ErrTooLarge.Error() {
		t.Errorf("a plain error became %v", f)
	}
}

// The objects without fault are returned beside the faults of the others.
func TestGoodObjectsBesideBadOnes(t *testing.T) {
	objs, err := Decode([]byte(service("a")+"---\nkind: X\n"+service("b")), "f.yaml")
	if err == nil || len(objs) != 2 || objs[1].Line != 11 {
		t.Errorf("%v, %v", objs, err)
	}
}

func TestLookupKind(t *testing.T) {
	for word, want := range map[string]string{"svc": "Service", "Services": "Service", "httproute": "HTTPRoute", "cftd": "ClusterFederatedTrustDomain",
		"serviceexports.multicluster.x-k8s.io": "ServiceExport", "peers.hanse.mesh": "Peer", "service.apps": "", "pods": ""} {
		k, _ := LookupKind(word)
		if k.Name != want {
			t.Errorf("%s is %q, want %q", word, k.Name, want)
		}
	}
}
