package bundle_test

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"

	"github.com/hanse-mesh/hanse/identity/bundle"
)

// union is a bundle of several authorities' roots under one sequence; 0 is none.
func union(seq uint64, parts ...*spiffebundle.Bundle) *spiffebundle.Bundle {
	b := spiffebundle.New(parts[0].TrustDomain())
	for _, p := range parts {
		for _, c := range p.X509Authorities() {
			b.AddX509Authority(c)
		}
		for kid, key := range p.JWTAuthorities() {
			if err := b.AddJWTAuthority(kid, key); err != nil {
				panic(err)
			}
		}
	}
	if seq != 0 {
		b.SetSequenceNumber(seq)
	}
	return b
}

func TestShrinkingBundle(t *testing.T) {
	old, next, stranger := authority(t, east).Bundle(), authority(t, east).Bundle(), authority(t, east).Bundle()
	now := time.Now()
	expired := old.X509Authorities()[0].NotAfter.Add(time.Second)
	for _, c := range []struct {
		name    string
		b       *spiffebundle.Bundle
		at      time.Time
		vouched bool
		want    error
	}{
		{"a root more", union(6, old, next, stranger), now, false, nil},
		{"a root less, announced", union(6, next), now, false, nil}, // a revocation must take effect at once
		{"a root less, under the same sequence", union(5, next), now, false, bundle.ErrStale},
		{"a root less, under an older sequence", union(4, next), now, false, bundle.ErrStale},
		{"a root less, without a sequence", union(0, next), now, false, bundle.ErrShrinks},
		{"a root less, without a sequence, expired", union(0, next), expired, false, nil},
		{"all roots others, announced by one whom it no longer verifies", union(6, stranger), now, false, bundle.ErrShrinks},
		{"all roots others, vouched for", union(6, stranger), now, true, nil},
		{"all roots others, vouched for without a sequence", union(0, stranger), now, true, bundle.ErrShrinks},
		{"all roots others, expired", union(6, stranger), expired, false, nil},
		{"no root", union(6, spiffebundle.New(east)), now, true, bundle.ErrEmpty},
	} {
		t.Run(c.name, func(t *testing.T) {
			reg := prometheus.NewRegistry()
			s, err := bundle.Open(bundle.Config{TrustDomain: west, Now: func() time.Time { return c.at }, Registerer: reg})
			check(t, err)
			check(t, s.Relate(bundle.Relation{TrustDomain: east}))
			check(t, s.Set(east, union(5, old, next), "mesh"))
			set := s.Set
			if c.vouched {
				set = s.SetVouched
			}
			if err := set(east, c.b, "endpoint"); !errors.Is(err, c.want) || (err == nil) != (c.want == nil) {
				t.Fatalf("%v, want %v", err, c.want)
			}
			refusal, refused := s.Refusals()[east]
			if counted, err := reg.Gather(); err != nil || refused != (c.want != nil) || len(counted) == 1 != refused {
				t.Errorf("reported: %v, counted: %v, %v", refused, counted, err)
			}
			if !refused {
				return
			}
			if b, _ := s.Get(east); !b.Equal(union(5, old, next)) || refusal.Source != "endpoint" || refusal.Reason == "" {
				t.Errorf("the bundle in force changed, or %+v does not say why", refusal)
			}
			check(t, s.Set(east, union(5, old, next), "mesh"))
			if len(s.Refusals()) != 1 {
				t.Error("another source made it good")
			}
			check(t, s.Set(east, union(5, old, next), "endpoint"))
			if len(s.Refusals()) != 0 {
				t.Error("still reported after the source came to reason")
			}
			if err := s.Replace(east, c.b, "administrator"); (err != nil) != (c.want == bundle.ErrEmpty) { // a person decides otherwise
				t.Errorf("an administrator: %v", err)
			}
		})
	}
}

func TestDistrust(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	bad, good := authority(t, east).Bundle(), authority(t, east).Bundle()
	badID := bundle.AuthorityID(bad.X509Authorities()[0])
	check(t, s.Relate(bundle.Relation{TrustDomain: east}))
	check(t, s.Set(east, union(5, bad, good), "mesh"))
	check(t, s.Set(west, authority(t, west).Bundle(), "own"))

	if td, id, err := s.Find(strings.ToUpper(badID[:10])); err != nil || td != east || id != badID {
		t.Errorf("Find = %s, %s, %v", td, id, err)
	}
	for prefix, want := range map[string]error{badID[:4]: bundle.ErrUnknownAuthority, "0123456789abcdef": bundle.ErrUnknownAuthority} {
		if _, _, err := s.Find(prefix); !errors.Is(err, want) {
			t.Errorf("Find(%s): %v", prefix, err)
		}
	}
	if err := s.Distrust(west, ""); !errors.Is(err, bundle.ErrTrustDomain) {
		t.Errorf("distrusts itself: %v", err)
	}

	revision := s.Revision()
	changed := s.Changed()
	check(t, s.Distrust(east, badID))
	check(t, s.Distrust(east, badID))
	<-changed
	if s.Revision() != revision+1 {
		t.Error("proxies do not hear of it, or twice")
	}
	without := func(s *bundle.Store) {
		t.Helper()
		b, ok := s.Get(east)
		x, err := s.GetX509BundleForTrustDomain(east)
		if !ok || err != nil || len(b.X509Authorities()) != 1 || x.HasX509Authority(bad.X509Authorities()[0]) || s.All()[east].HasX509Authority(bad.X509Authorities()[0]) {
			t.Error("what is distrusted is in force")
		}
	}
	without(s)
	without(open(t, dir))
	check(t, s.Set(east, union(6, bad, good), "mesh")) // the partner pushes it again
	check(t, s.Replace(east, union(7, bad, good), "a file"))
	without(s)

	check(t, s.Distrust(east, ""))
	for _, s := range []*bundle.Store{s, open(t, dir)} {
		if _, ok := s.Get(east); ok || len(s.Sequences()) != 1 || len(s.Distrusted()) != 2 {
			t.Error("the trust domain is in force")
		}
	}
	check(t, s.Set(east, union(8, bad, good), "mesh")) // kept, and in force when it is trusted again
	if found, err := s.Trust(east, ""); err != nil || !found {
		t.Errorf("Trust = %v, %v", found, err)
	}
	if b, ok := open(t, dir).Get(east); !ok || len(b.X509Authorities()) != 2 || len(s.Distrusted()) != 0 {
		t.Error("not trusted again")
	}
	if found, err := s.Trust(east, badID); err != nil || found {
		t.Errorf("Trust of what is trusted = %v, %v", found, err)
	}
	// Nothing is left of a bundle of which every authority is distrusted.
	check(t, s.Distrust(east, badID))
	check(t, s.Distrust(east, bundle.AuthorityID(good.X509Authorities()[0])))
	if _, ok := s.Get(east); ok {
		t.Error("a bundle without an authority is in force")
	}
}
