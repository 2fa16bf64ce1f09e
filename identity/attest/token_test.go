package attest_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hanse-mesh/hanse/identity"
	"github.com/hanse-mesh/hanse/identity/attest"
)

var (
	west     = spiffeid.RequireTrustDomainFromString("west.demo")
	frontend = spiffeid.RequireFromString("spiffe://west.demo/ns/shop/sa/frontend")
	keyA     = [32]byte{1}
	keyB     = [32]byte{2}
)

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

type fixture struct {
	*attest.Tokens
	store *attest.Memory
	now   time.Time
}

func newFixture() *fixture {
	f := &fixture{store: attest.NewMemory(), now: time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)}
	f.Tokens = attest.New(west, f.store, func() time.Time { return f.now })
	return f
}

func TestRedeem(t *testing.T) {
	f := newFixture()
	ctx := t.Context()
	token, expires, err := f.Create(ctx, attest.Grant{ID: frontend}, 0)
	check(t, err)
	if expires.Sub(f.now) != attest.DefaultTTL || len(token) < 43 {
		t.Errorf("token of %d characters expires in %v", len(token), expires.Sub(f.now))
	}
	red, err := f.Redeem(ctx, token, keyA)
	check(t, err)
	if red.ID != frontend || !strings.HasPrefix(red.AgentID.String(), "spiffe://west.demo/spire/agent/join_token/") {
		t.Errorf("redeemed %+v", red)
	}
	if again, err := f.Redeem(ctx, token, keyA); err != nil || again != red {
		t.Errorf("the same agent repeats: %+v, %v", again, err)
	}
	if _, err := f.Redeem(ctx, token, keyB); !errors.Is(err, attest.ErrUsed) {
		t.Errorf("another agent: %v", err)
	}
	f.now = f.now.Add(attest.DefaultTTL)
	if _, err := f.Redeem(ctx, token, keyA); !errors.Is(err, attest.ErrExpired) {
		t.Errorf("the same agent after the end: %v", err)
	}
}

func TestRefusals(t *testing.T) {
	f := newFixture()
	ctx := t.Context()
	token, _, err := f.Create(ctx, attest.Grant{ID: frontend}, time.Minute)
	check(t, err)
	foreign, _, err := newFixture().Create(ctx, attest.Grant{}, 0)
	check(t, err)
	flipped := []byte(token)
	flipped[20] ^= 1
	for name, c := range map[string]struct {
		token string
		want  error
	}{
		"another cluster's":     {foreign, attest.ErrUnknown},
		"no token at all":       {"", attest.ErrUnknown},
		"some word":             {"swordfish-swordfish", attest.ErrUnknown},
		"a novel":               {strings.Repeat("x", 10000), attest.ErrUnknown},
		"a character changed":   {string(flipped), attest.ErrTampered},
		"a character lost":      {token[:len(token)-1], attest.ErrTampered},
		"a character too many":  {token + "A", attest.ErrTampered},
		"padding of the base64": {token + "=", attest.ErrTampered},
		"only the prefix":       {"hna1_", attest.ErrTampered},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := f.Redeem(ctx, c.token, keyA); !errors.Is(err, c.want) {
				t.Errorf("error %v, want %v", err, c.want)
			}
		})
	}
	f.now = f.now.Add(2 * time.Minute)
	if _, err := f.Redeem(ctx, token, keyA); !errors.Is(err, attest.ErrExpired) {
		t.Errorf("expired: %v", err)
	}
}

func TestGrants(t *testing.T) {
	f := newFixture()
	ctx := t.Context()
	for _, id := range []spiffeid.ID{{}, frontend, identity.GatewayID(west)} {
		token, _, err := f.Create(ctx, attest.Grant{ID: id}, 0)
		check(t, err)
		if red, err := f.Redeem(ctx, token, keyA); err != nil || red.ID != id {
			t.Errorf("%s: %v, %v", id, red.ID, err)
		}
	}
	admin, err := identity.AdminID(west, "anna")
	check(t, err)
	for _, id := range []spiffeid.ID{admin, identity.ControlPlaneID(west), identity.SPIREServerID(west), west.ID(),
		spiffeid.RequireFromString("spiffe://east.demo/ns/shop/sa/frontend"), spiffeid.RequireFromString("spiffe://east.demo/hanse/gateway")} {
		if _, _, err := f.Create(ctx, attest.Grant{ID: id}, 0); err == nil {
			t.Errorf("a token for %s", id)
		}
	}
	if _, _, err := f.Create(ctx, attest.Grant{}, 365*24*time.Hour); err == nil {
		t.Error("a token for a year")
	}
}

// Neither the store nor an ID tells a token.
func TestSecrecy(t *testing.T) {
	f := newFixture()
	token, _, err := f.Create(t.Context(), attest.Grant{ID: frontend}, 0)
	check(t, err)
	red, err := f.Redeem(t.Context(), token, keyA)
	check(t, err)
	all, err := f.store.List(t.Context(), "")
	check(t, err)
	agentHash := red.AgentID.Path()[strings.LastIndex(red.AgentID.Path(), "/")+1:]
	for key, value := range all {
		for _, part := range []string{token, token[5:], token[5:20]} {
			if strings.Contains(key+string(value)+red.AgentID.String(), part) {
				t.Errorf("%s=%q or %s contains the token", key, value, red.AgentID)
			}
		}
		if strings.Contains(key, agentHash) {
			t.Errorf("the agent's ID tells the store's key %s", key)
		}
	}
}

func TestRegister(t *testing.T) {
	f := newFixture()
	ctx := t.Context()
	const token = "a-token-from-elsewhere"
	_, err := f.Register(ctx, token, attest.Grant{}, time.Minute)
	check(t, err)
	if _, err := f.Register(ctx, token, attest.Grant{ID: frontend}, time.Minute); err == nil {
		t.Error("the same token twice")
	}
	for _, bad := range []string{"", "short", "hna1_looks-like-one-of-ours", strings.Repeat("x", 1000)} {
		if _, err := f.Register(ctx, bad, attest.Grant{}, time.Minute); err == nil {
			t.Errorf("registers %.20q", bad)
		}
	}
	if red, err := f.Redeem(ctx, token, keyA); err != nil || !red.ID.IsZero() {
		t.Errorf("redeemed %+v, %v", red, err)
	}
}

func TestOneOfMany(t *testing.T) {
	f := newFixture()
	token, _, err := f.Create(t.Context(), attest.Grant{ID: frontend}, 0)
	check(t, err)
	var ok, used atomic.Int32
	var wg sync.WaitGroup
	for i := range 50 {
		wg.Go(func() {
			_, err := f.Redeem(context.Background(), token, [32]byte{byte(i)})
			switch {
			case err == nil:
				ok.Add(1)
			case errors.Is(err, attest.ErrUsed):
				used.Add(1)
			default:
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if ok.Load() != 1 || used.Load() != 49 {
		t.Errorf("%d redeemed, %d used", ok.Load(), used.Load())
	}
}

func TestSweep(t *testing.T) {
	f := newFixture()
	ctx := t.Context()
	var tokens []string
	for i := range 3 {
		token, _, err := f.Create(ctx, attest.Grant{}, time.Duration(i+1)*24*time.Hour)
		check(t, err)
		_, err = f.Redeem(ctx, token, keyA)
		check(t, err)
		tokens = append(tokens, token)
	}
	f.now = f.now.Add(2*24*time.Hour + time.Minute)
	check(t, f.Sweep(ctx))
	for i, want := range []error{attest.ErrUnknown, attest.ErrExpired, nil} {
		if _, err := f.Redeem(ctx, tokens[i], keyA); !errors.Is(err, want) {
			t.Errorf("token %d: %v, want %v", i, err, want)
		}
	}
	if all, err := f.store.List(ctx, ""); err != nil || len(all) != 4 {
		t.Errorf("%d records, %v", len(all), err)
	}
}

type brokenStore struct{ attest.Store }

func (brokenStore) Get(context.Context, string) ([]byte, error) { return nil, fmt.Errorf("no quorum") }

func TestBrokenStore(t *testing.T) {
	f := newFixture()
	token, _, err := f.Create(t.Context(), attest.Grant{}, 0)
	check(t, err)
	_, err = attest.New(west, brokenStore{f.store}, nil).Redeem(t.Context(), token, keyA)
	if err == nil || !strings.Contains(err.Error(), "no quorum") || errors.Is(err, attest.ErrUnknown) || strings.Contains(err.Error(), token) {
		t.Errorf("error: %v", err)
	}
}

func FuzzRedeem(f *testing.F) {
	x := newFixture()
	token, _, err := x.Create(f.Context(), attest.Grant{}, 0)
	check(f, err)
	f.Add(token[:20])
	f.Add("hna1_")
	f.Add("")
	f.Fuzz(func(t *testing.T, s string) {
		if _, err := x.Redeem(t.Context(), s, keyA); s != token && !errors.Is(err, attest.ErrUnknown) && !errors.Is(err, attest.ErrTampered) {
			t.Errorf("Redeem(%q) = %v", s, err)
		}
	})
}

// A replica whose clock differs by ten minutes from that of the one that made a token ends the token so much sooner or later, and says by which
// clock; at no time may it be used twice.
func TestReplicasClocks(t *testing.T) {
	for _, skew := range []time.Duration{10 * time.Minute, -10 * time.Minute} {
		f := newFixture()
		other := attest.New(west, f.store, func() time.Time { return f.now.Add(skew) })
		token, _, err := f.Create(t.Context(), attest.Grant{ID: frontend}, 0)
		check(t, err)
		f.now = f.now.Add(attest.DefaultTTL - skew - time.Second)
		_, err = other.Redeem(t.Context(), token, keyA)
		check(t, err)
		if _, err := f.Redeem(t.Context(), token, keyB); !errors.Is(err, attest.ErrUsed) {
			t.Errorf("%v: another agent, elsewhere: %v", skew, err)
		}
		f.now = f.now.Add(time.Second)
		if _, err := other.Redeem(t.Context(), token, keyA); !errors.Is(err, attest.ErrExpired) || !strings.Contains(err.Error(), f.now.Add(skew).Format(time.RFC3339)) {
			t.Errorf("%v: at the end, by the other replica's clock: %v", skew, err)
		}
	}
}
