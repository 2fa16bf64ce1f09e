package spiretypes_test

import (
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/protobuf/proto"

	"github.com/hanse-mesh/hanse/identity/ca"
	"github.com/hanse-mesh/hanse/identity/spiretypes"
)

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func westBundle(t testing.TB) *types.Bundle {
	t.Helper()
	a, err := ca.Open(ca.Config{Dir: t.TempDir(), TrustDomain: spiffeid.RequireTrustDomainFromString("west.demo")})
	check(t, err)
	b := a.Bundle()
	p, err := spiretypes.FromBundle(b)
	check(t, err)
	again, err := spiretypes.ToBundle(p)
	check(t, err)
	if !again.Equal(b) {
		t.Error("a bundle does not survive")
	}
	return p
}

func TestBundle(t *testing.T) {
	p := westBundle(t)
	p.X509Authorities[0].Tainted = true // trusted until it is taken out
	p.RefreshHint = 1 << 60
	b, err := spiretypes.ToBundle(p)
	check(t, err)
	if hint, _ := b.RefreshHint(); len(b.X509Authorities()) != 1 || hint > 24*time.Hour {
		t.Errorf("%d roots, refresh hint %v", len(b.X509Authorities()), hint)
	}
	for name, p := range map[string]*types.Bundle{
		"nothing":            nil,
		"no trust domain":    {},
		"noise":              {TrustDomain: "west.demo", X509Authorities: []*types.X509Certificate{{Asn1: []byte("x")}}},
		"a nil authority":    {TrustDomain: "west.demo", JwtAuthorities: []*types.JWTKey{nil}},
		"a key without ID":   {TrustDomain: "west.demo", JwtAuthorities: []*types.JWTKey{{PublicKey: p.JwtAuthorities[0].PublicKey}}},
		"a malformed domain": {TrustDomain: "west demo"},
	} {
		if _, err := spiretypes.ToBundle(p); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func TestID(t *testing.T) {
	for _, c := range []struct {
		p    *types.SPIFFEID
		want string
	}{
		{&types.SPIFFEID{TrustDomain: "west.demo", Path: "/a/b"}, "spiffe://west.demo/a/b"},
		{&types.SPIFFEID{TrustDomain: "west.demo", Path: "a/b"}, "spiffe://west.demo/a/b"},
		{&types.SPIFFEID{TrustDomain: "west.demo"}, "spiffe://west.demo"},
		{&types.SPIFFEID{TrustDomain: "west.demo", Path: "/a/../b"}, ""},
		{&types.SPIFFEID{TrustDomain: "west.demo", Path: "/"}, ""},
		{&types.SPIFFEID{TrustDomain: "WEST", Path: "/a"}, ""},
		{&types.SPIFFEID{}, ""},
		{nil, ""},
	} {
		id, err := spiretypes.ToID(c.p)
		if (err == nil) != (c.want != "") || err == nil && id.String() != c.want {
			t.Errorf("ToID(%v) = %s, %v, want %q", c.p, id, err, c.want)
		}
	}
}

func TestChainIsBounded(t *testing.T) {
	p := westBundle(t)
	svid := &types.X509SVID{}
	if _, err := spiretypes.ToChain(svid); err == nil {
		t.Error("an empty chain")
	}
	for range 100 {
		svid.CertChain = append(svid.CertChain, p.X509Authorities[0].Asn1)
	}
	if _, err := spiretypes.ToChain(svid); err == nil {
		t.Error("a chain of 100")
	}
	if _, err := spiretypes.ToChain(&types.X509SVID{CertChain: [][]byte{{1}}}); err == nil {
		t.Error("noise")
	}
}

func FuzzToBundle(f *testing.F) {
	data, err := proto.Marshal(westBundle(f))
	check(f, err)
	f.Add(data)
	f.Fuzz(func(t *testing.T, data []byte) {
		p := new(types.Bundle)
		if proto.Unmarshal(data, p) != nil {
			return
		}
		b, err := spiretypes.ToBundle(p)
		if err != nil {
			return
		}
		again, err := spiretypes.FromBundle(b)
		if err != nil {
			t.Fatalf("what was decoded does not encode: %v", err)
		}
		if c, err := spiretypes.ToBundle(again); err != nil || !c.Equal(b) {
			t.Errorf("does not survive encoding: %v", err)
		}
	})
}
