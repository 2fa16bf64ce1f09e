package proxy_test

import (
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hanse-mesh/hanse/identity"
	"github.com/hanse-mesh/hanse/proxy"
)

const (
	frontend = "spiffe://west.demo/ns/shop/sa/frontend"
	stranger = "spiffe://east.demo/ns/shop/sa/frontend"
)

func rule(policy string, change ...func(*proxy.AccessRule)) proxy.AccessRule {
	r := proxy.AccessRule{Policy: policy}
	for _, c := range change {
		c(&r)
	}
	return r
}

func from(p ...string) func(*proxy.AccessRule)    { return func(r *proxy.AccessRule) { r.From = p } }
func paths(p ...string) func(*proxy.AccessRule)   { return func(r *proxy.AccessRule) { r.Paths = p } }
func methods(m ...string) func(*proxy.AccessRule) { return func(r *proxy.AccessRule) { r.Methods = m } }
func foreign(r *proxy.AccessRule)                 { r.Foreign = true }

func TestAccess(t *testing.T) {
	rules := func(r ...proxy.AccessRule) []proxy.AccessRule { return r }
	for _, c := range []struct {
		name                 string
		a                    proxy.Access
		caller, method, path string
		want                 bool
		policy               string
	}{
		{"zero denies", proxy.Access{}, frontend, "GET", "/", false, ""},
		{"default for own trust domain", proxy.Access{DefaultAllow: true}, frontend, "GET", "/", true, ""},
		{"default never for foreign", proxy.Access{DefaultAllow: true}, stranger, "GET", "/", false, ""},
		{"no ID", proxy.Access{DefaultAllow: true}, "", "GET", "/", false, ""},
		{"not an ID", proxy.Access{DefaultAllow: true}, "spiffe:///x", "GET", "/", false, ""},
		{"allow rule", proxy.Access{Allow: rules(rule("p", from(frontend)))}, frontend, "GET", "/", true, "p"},
		{"allow rule, other caller", proxy.Access{Allow: rules(rule("p", from(frontend)))}, "spiffe://west.demo/ns/shop/sa/x", "GET", "/", false, ""},
		{"not exported", proxy.Access{Allow: rules(rule("p", from(stranger)))}, stranger, "GET", "/", false, ""},
		{"exported", proxy.Access{Allow: rules(rule("p", from(stranger), foreign))}, stranger, "GET", "/", true, "p"},
		{"deny first", proxy.Access{Deny: rules(rule("d", from(frontend))), Allow: rules(rule("p"))}, frontend, "GET", "/", false, "d"},
		{"deny holds for foreign", proxy.Access{Deny: rules(rule("d")), Allow: rules(rule("p", foreign))}, stranger, "GET", "/", false, "d"},
		{"method", proxy.Access{Allow: rules(rule("p", methods("GET")))}, frontend, "POST", "/", false, ""},
		{"path exact", proxy.Access{Allow: rules(rule("p", paths("/a")))}, frontend, "GET", "/a/b", false, ""},
		{"path prefix", proxy.Access{Allow: rules(rule("p", paths("/a/*")))}, frontend, "GET", "/a/b", true, "p"},
		{"no way out by dots", proxy.Access{Allow: rules(rule("p", paths("/pub/*")))}, frontend, "GET", "/pub/../admin", false, ""},
		{"no way out by encoded dots", proxy.Access{Allow: rules(rule("p", paths("/pub/*")))}, frontend, "GET", "/pub/%2e%2E%2fadmin", false, ""},
		{"no way out by parameters", proxy.Access{Allow: rules(rule("p", paths("/pub/*")))}, frontend, "GET", "/pub/..;x/admin", false, ""},
		{"deny through encoding", proxy.Access{DefaultAllow: true, Deny: rules(rule("d", paths("/admin*")))}, frontend, "GET", "/%61dmin", false, "d"},
		{"deny through slashes", proxy.Access{DefaultAllow: true, Deny: rules(rule("d", paths("/admin*")))}, frontend, "GET", "//admin", false, "d"},
		{"deny through backslash", proxy.Access{DefaultAllow: true, Deny: rules(rule("d", paths("/a/b")))}, frontend, "GET", `/a\b`, false, "d"},
		{"encoded characters stay allowed", proxy.Access{Allow: rules(rule("p", paths("/files/*")))}, frontend, "GET", "/files/a%20b", true, "p"},
		{"TCP: allow rule needs HTTP", proxy.Access{Allow: rules(rule("p", paths("/a")))}, frontend, "", "", false, ""},
		{"TCP: star is HTTP too", proxy.Access{Allow: rules(rule("p", paths("*")))}, frontend, "", "", false, ""},
		{"TCP: deny rule holds", proxy.Access{DefaultAllow: true, Deny: rules(rule("d", methods("GET")))}, frontend, "", "", false, "d"},
		{"TCP: plain rule", proxy.Access{Allow: rules(rule("p", from(frontend)))}, frontend, "", "", true, "p"},
	} {
		c.a.TrustDomain = "west.demo"
		d := c.a.Check(c.caller, c.method, c.path)
		if d.Allow != c.want || d.Policy != c.policy || d.Reason == "" || d.Audit != "" {
			t.Errorf("%s: %+v", c.name, d)
		}
	}
}

func TestAudit(t *testing.T) {
	one := []proxy.AccessRule{rule("audit", from(frontend))}
	other := []proxy.AccessRule{rule("audit", from("spiffe://west.demo/ns/x/sa/x"))}
	for _, c := range []struct {
		name       string
		a          proxy.Access
		allow      bool
		audit      string
		auditAllow bool
	}{
		{"would be denied", proxy.Access{DefaultAllow: true, AuditDeny: one}, true, "audit", false},
		{"would be allowed", proxy.Access{AuditAllow: one}, false, "audit", true},
		{"would lose the default", proxy.Access{DefaultAllow: true, AuditAllow: other}, true, "audit", false},
		{"enforced deny wins", proxy.Access{Deny: []proxy.AccessRule{rule("d")}, AuditAllow: one}, false, "", false},
		{"enforced allow stays", proxy.Access{Allow: []proxy.AccessRule{rule("p")}, AuditAllow: other}, true, "", false},
	} {
		c.a.TrustDomain = "west.demo"
		d := c.a.Check(frontend, "GET", "/")
		if d.Allow != c.allow || d.Audit != c.audit || d.AuditAllow != c.auditAllow {
			t.Errorf("%s: %+v", c.name, d)
		}
	}
}

func TestAccessDoesNotAllocate(t *testing.T) {
	a := proxy.Access{TrustDomain: "west.demo", Allow: []proxy.AccessRule{
		rule("p", from("spiffe://*/ns/x/**", "spiffe://west.demo/ns/shop/sa/*"), methods("GET"), paths("/a/*")),
	}}
	if n := testing.AllocsPerRun(100, func() {
		if !a.Check(frontend, "GET", "/a/b").Allow {
			t.Fatal("denied")
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// TestMatchIDAgrees holds MatchID to identity.MatchPattern on random patterns and IDs of a small alphabet.
func TestMatchIDAgrees(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	segs := []string{"a", "b", "ns", "*", "**", ""}
	join := func(n int, from []string) string {
		s := make([]string, n)
		for i := range s {
			s[i] = from[r.IntN(len(from))]
		}
		return strings.Join(s, "/")
	}
	matches := 0
	for range 200_000 {
		pattern := "spiffe://" + join(1+r.IntN(4), segs)
		id, err := spiffeid.FromString("spiffe://" + join(1+r.IntN(4), segs[:3]))
		if err != nil {
			t.Fatal(err)
		}
		want := identity.MatchPattern(pattern, id)
		if got := proxy.MatchID(pattern, id.String()); got != want {
			t.Fatalf("MatchID(%q, %q) = %v, identity.MatchPattern says %v", pattern, id, got, want)
		}
		if want {
			matches++
		}
	}
	if matches < 1000 {
		t.Errorf("only %d matches: the test says little", matches)
	}
	if proxy.MatchID("http://a", "spiffe://a") || proxy.MatchID("spiffe://a", "http://a") {
		t.Error("matched without the scheme")
	}
}

func FuzzAccessPath(f *testing.F) {
	for _, s := range []string{"/pub/a", "/pub/../admin", "/pub/%2e%2e/admin", "//admin", `/pub\..\admin`, "/pub/%", "/pub/;/..;/admin"} {
		f.Add(s)
	}
	a := proxy.Access{TrustDomain: "west.demo", Allow: []proxy.AccessRule{rule("p", paths("/pub/*"))}}
	f.Fuzz(func(t *testing.T, path string) {
		if a.Check(frontend, "GET", path).Allow && !strings.HasPrefix(path, "/pub/") {
			t.Errorf("%q was allowed", path)
		}
	})
}
