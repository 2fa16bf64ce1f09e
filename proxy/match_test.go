package proxy

import (
	"net/http"
	"strings"
	"testing"
)

func header(h http.Header) func(string) (string, bool) {
	return func(name string) (string, bool) {
		v := h.Values(name)
		return strings.Join(v, ", "), len(v) > 0
	}
}

func TestMatch(t *testing.T) {
	re := func(expr string) *Match {
		r, err := CompileWhole(expr)
		if err != nil {
			t.Fatal(err)
		}
		return &Match{PathRegex: r}
	}
	for _, c := range []struct {
		name string
		m    *Match
		r    Request
		want bool
	}{
		{"zero matches all", &Match{}, Request{Path: "*"}, true},
		{"exact", &Match{PathExact: "/a"}, Request{Path: "/a"}, true},
		{"exact not slash", &Match{PathExact: "/a"}, Request{Path: "/a/"}, false},
		{"prefix itself", &Match{PathPrefix: "/a"}, Request{Path: "/a"}, true},
		{"prefix element", &Match{PathPrefix: "/a"}, Request{Path: "/a/b"}, true},
		{"prefix not within element", &Match{PathPrefix: "/a"}, Request{Path: "/ab"}, false},
		{"prefix with slash", &Match{PathPrefix: "/a/"}, Request{Path: "/a"}, true},
		{"root prefix", &Match{PathPrefix: "/"}, Request{Path: "/x"}, true},
		{"regex is whole", re("/a|/ab"), Request{Path: "/ab"}, true},
		{"regex not part", re("/a"), Request{Path: "/ab"}, false},
		{"method", &Match{Method: "POST"}, Request{Method: "GET"}, false},
		{"header", &Match{Headers: []ValueMatch{{Name: "x-a", Exact: "1"}}}, Request{Header: header(http.Header{"X-A": {"1"}})}, true},
		{"header absent", &Match{Headers: []ValueMatch{{Name: "x-a", Exact: ""}}}, Request{Header: header(nil)}, false},
		{"header without lookup", &Match{Headers: []ValueMatch{{Name: "x-a", Exact: ""}}}, Request{}, false},
		{"query", &Match{Query: []ValueMatch{{Name: "k", Exact: "v"}}}, Request{RawQuery: "a=b&k=v"}, true},
		{"query first counts", &Match{Query: []ValueMatch{{Name: "k", Exact: "v"}}}, Request{RawQuery: "k=w&k=v"}, false},
		{"query encoded", &Match{Query: []ValueMatch{{Name: "k k", Exact: "v&"}}}, Request{RawQuery: "k%20k=v%26"}, true},
		{"query malformed", &Match{Query: []ValueMatch{{Name: "k", Exact: "v"}}}, Request{RawQuery: "k=%zz"}, false},
		{"query empty value", &Match{Query: []ValueMatch{{Name: "k"}}}, Request{RawQuery: "k"}, true},
	} {
		if got := c.m.Matches(&c.r); got != c.want {
			t.Errorf("%s: Matches = %v", c.name, got)
		}
	}
	if _, err := CompileWhole("a)(b"); err == nil {
		t.Error("an expression that escapes its brackets was accepted")
	}
}

func TestListenerMatchTakesFirst(t *testing.T) {
	a, b := &Route{Match: Match{PathPrefix: "/a"}}, &Route{}
	l := &Listener{Routes: []*Route{a, b}}
	if l.Match(&Request{Path: "/a/x"}) != a || l.Match(&Request{Path: "/b"}) != b {
		t.Error("not the first matching route")
	}
	if (&Listener{Routes: []*Route{a}}).Match(&Request{Path: "/b"}) != nil {
		t.Error("matched nothing, want nil")
	}
}

func TestMatchDoesNotAllocate(t *testing.T) {
	re, _ := CompileWhole("v[0-9]+")
	l := &Listener{Routes: []*Route{
		{Match: Match{PathExact: "/x"}},
		{Match: Match{PathPrefix: "/pay", Method: "POST", Headers: []ValueMatch{{Name: "x-version", Regex: re}}, Query: []ValueMatch{{Name: "q", Exact: "1"}}}},
	}}
	h := func(string) (string, bool) { return "v12", true }
	r := &Request{Method: "POST", Path: "/pay/1", RawQuery: "a=b&q=1", Header: h}
	if n := testing.AllocsPerRun(100, func() {
		if l.Match(r) == nil {
			t.Fatal("no match")
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func TestPickWeights(t *testing.T) {
	rt := &Route{Backends: []Backend{{Cluster: "a", Weight: 70}, {Cluster: "z"}, {Cluster: "b", Weight: 30}}}
	got := map[string]int{}
	const n = 1000
	for i := range uint64(n) {
		got[rt.Pick(i*(1<<63/n)*2).Cluster]++
	}
	if got["a"] < 699 || got["a"] > 701 || got["z"] != 0 {
		t.Errorf("shares %v", got)
	}
	if (&Route{Backends: []Backend{{Cluster: "a"}}}).Pick(1) != nil {
		t.Error("picked a backend of weight 0")
	}
	if b := (&Listener{Cluster: "c"}).PickTCP(1); b == nil || b.Cluster != "c" {
		t.Errorf("PickTCP = %v", b)
	}
}

// The rows are the Gateway API's table at HTTPPathModifier.ReplacePrefixMatch.
func TestReplacePrefix(t *testing.T) {
	for _, c := range []struct{ path, prefix, replace, want string }{
		{"/foo/bar", "/foo", "/xyz", "/xyz/bar"},
		{"/foo/bar", "/foo", "/xyz/", "/xyz/bar"},
		{"/foo/bar", "/foo/", "/xyz", "/xyz/bar"},
		{"/foo/bar", "/foo/", "/xyz/", "/xyz/bar"},
		{"/foo", "/foo", "/xyz", "/xyz"},
		{"/foo/", "/foo", "/xyz", "/xyz/"},
		{"/foo/bar", "/foo", "", "/bar"},
		{"/foo/", "/foo", "", "/"},
		{"/foo", "/foo", "", "/"},
		{"/foo/", "/foo", "/", "/"},
		{"/foo", "/foo", "/", "/"},
		{"/foo", "/", "/xyz", "/xyz/foo"},
		{"/foo", "", "/xyz", "/xyz/foo"},
	} {
		w := &Rewrite{ReplacePrefix: &c.replace}
		if got := w.Path(&Match{PathPrefix: c.prefix}, c.path); got != c.want {
			t.Errorf("%s, prefix %s → %s: %s, want %s", c.path, c.prefix, c.replace, got, c.want)
		}
	}
	whole := "/new"
	if got := (&Rewrite{ReplacePath: &whole}).Path(&Match{}, "/a/b"); got != whole {
		t.Errorf("ReplacePath: %s", got)
	}
	if got := (&Rewrite{}).Path(&Match{}, "/a"); got != "/a" {
		t.Errorf("no rewrite: %s", got)
	}
}

func TestRewriteOfBackendWins(t *testing.T) {
	p, q := "/p", "/q"
	rt := &Route{Rewrite: Rewrite{Host: "r", ReplacePath: &p}}
	w := rt.RewriteOf(&Backend{Rewrite: Rewrite{ReplacePrefix: &q}})
	if w.Host != "r" || w.ReplacePath != nil || *w.ReplacePrefix != q {
		t.Errorf("RewriteOf = %+v", w)
	}
	if w = rt.RewriteOf(&Backend{Rewrite: Rewrite{Host: "b"}}); w.Host != "b" || w.ReplacePath != &p {
		t.Errorf("RewriteOf = %+v", w)
	}
}

func TestLocation(t *testing.T) {
	s := func(s string) *string { return &s }
	for _, c := range []struct {
		d                           Redirect
		scheme, host, path, q, want string
	}{
		{Redirect{Host: "example.org"}, "http", "echo", "/a", "", "http://example.org/a"},
		{Redirect{Host: "example.org"}, "http", "echo:8080", "/a", "x=1", "http://example.org:8080/a?x=1"},
		{Redirect{Scheme: "https"}, "http", "echo:8080", "/", "", "https://echo/"},
		{Redirect{Scheme: "https", Port: 8443}, "http", "echo", "/", "", "https://echo:8443/"},
		{Redirect{Scheme: "https", Port: 443}, "http", "echo", "/", "", "https://echo/"},
		{Redirect{Port: 80}, "http", "echo:8080", "/", "", "http://echo/"},
		{Redirect{Port: 8083}, "http", "[2001:db8::1]:80", "/", "", "http://[2001:db8::1]:8083/"},
		{Redirect{}, "http", "[2001:db8::1]", "/", "", "http://[2001:db8::1]/"},
		{Redirect{ReplacePrefix: s("/new")}, "http", "echo", "/old/x", "", "http://echo/new/x"},
		{Redirect{ReplacePath: s("whole")}, "http", "echo", "/old/x", "", "http://echo/whole"},
	} {
		if got := c.d.Location(&Match{PathPrefix: "/old"}, c.scheme, c.host, c.path, c.q); got != c.want {
			t.Errorf("%+v of %s://%s%s: %s, want %s", c.d, c.scheme, c.host, c.path, got, c.want)
		}
	}
}

func TestHeaderEdits(t *testing.T) {
	h := http.Header{"A": {"0"}, "B": {"0"}, "C": {"0"}}
	e := HeaderEdits{Set: []Header{{"a", "1"}, {"d", "1"}}, Add: []Header{{"b", "1"}}, Remove: []string{"c"}}
	e.Apply(h)
	want := http.Header{"A": {"1"}, "B": {"0", "1"}, "D": {"1"}}
	if len(h) != len(want) || h.Get("a") != "1" || len(h["B"]) != 2 || h.Get("d") != "1" {
		t.Errorf("%v, want %v", h, want)
	}
}

func BenchmarkListenerMatch(b *testing.B) {
	l := &Listener{}
	for _, p := range []string{"/a", "/b", "/c", "/d", "/e"} {
		l.Routes = append(l.Routes, &Route{Match: Match{PathPrefix: p}})
	}
	r := &Request{Method: "GET", Path: "/e/x"}
	b.ReportAllocs()
	for b.Loop() {
		l.Match(r)
	}
}
