package proxy

import (
	"math/bits"
	"net/url"
	"regexp"
	"strconv"
	"strings"
)

// Request is the view of a request that matching needs.
type Request struct {
	Method   string
	Path     string // as received, without query
	RawQuery string // without "?"

	// Header returns the value of a field by its lower-case name, several values joined with ", ", and whether it is there.
	// "host" is the authority. Nil is no header.
	Header func(name string) (string, bool)
}

// Match returns the first route that matches, or nil: the caller answers 404.
func (l *Listener) Match(r *Request) *Route {
	for _, rt := range l.Routes {
		if rt.Match.Matches(r) {
			return rt
		}
	}
	return nil
}

// Matches reports whether all parts of m hold for r. It does not allocate unless a query parameter is percent-encoded.
func (m *Match) Matches(r *Request) bool {
	switch {
	case m.PathExact != "" && r.Path != m.PathExact:
		return false
	case m.PathPrefix != "" && !hasPathPrefix(r.Path, m.PathPrefix):
		return false
	case m.PathRegex != nil && !m.PathRegex.MatchString(r.Path):
		return false
	case m.Method != "" && r.Method != m.Method:
		return false
	}
	for i := range m.Headers {
		if r.Header == nil {
			return false
		}
		v, ok := r.Header(m.Headers[i].Name)
		if !ok || !m.Headers[i].holds(v) {
			return false
		}
	}
	for i := range m.Query {
		v, ok := queryValue(r.RawQuery, m.Query[i].Name)
		if !ok || !m.Query[i].holds(v) {
			return false
		}
	}
	return true
}

func (m *ValueMatch) holds(v string) bool {
	if m.Regex != nil {
		return m.Regex.MatchString(v)
	}
	return v == m.Exact
}

// CompileWhole compiles an expression (RE2) of a Match so that it matches whole values only.
func CompileWhole(expr string) (*regexp.Regexp, error) {
	if _, err := regexp.Compile(expr); err != nil { // so that "a)(b" is not let in by the brackets
		return nil, err
	}
	return regexp.Compile("^(?:" + expr + ")$")
}

// hasPathPrefix is by path element: "/a" and "/a/" are prefixes of "/a", "/a/" and "/a/b", not of "/ab"
// (Gateway API, PathMatchPathPrefix).
func hasPathPrefix(path, prefix string) bool {
	prefix = strings.TrimSuffix(prefix, "/")
	if !strings.HasPrefix(path, prefix) {
		return false
	}
	return len(path) == len(prefix) || prefix == "" || path[len(prefix)] == '/'
}

// queryValue returns the first value of a parameter (Gateway API: the first counts where a name repeats).
func queryValue(raw, name string) (string, bool) {
	for raw != "" {
		var pair string
		pair, raw, _ = strings.Cut(raw, "&")
		k, v, _ := strings.Cut(pair, "=")
		if k, ok := unescape(k); !ok || k != name {
			continue
		}
		return unescape(v)
	}
	return "", false
}

func unescape(s string) (string, bool) {
	if strings.IndexByte(s, '%') < 0 && strings.IndexByte(s, '+') < 0 {
		return s, true
	}
	u, err := url.QueryUnescape(s)
	return u, err == nil
}

// Pick chooses a backend in proportion to weights by rnd, a uniform random number. It is nil where no backend has a weight:
// the caller answers 500 (Gateway API, HTTPBackendRef.weight).
func (rt *Route) Pick(rnd uint64) *Backend { return pickBackend(rt.Backends, rnd) }

// ForSNI returns l as it is for a connection whose client names a server, "" where it names none.
func (l *Listener) ForSNI(name string) *Listener {
	for i := range l.SNI {
		for _, host := range l.SNI[i].Hosts {
			suffix, wild := strings.CutPrefix(host, "*")
			if name != "" && (host == name || wild && len(name) > len(suffix) && strings.HasSuffix(name, suffix)) {
				return &Listener{Authority: l.Authority, Protocol: l.Protocol, Split: l.SNI[i].Split}
			}
		}
	}
	return &Listener{Authority: l.Authority, Protocol: l.Protocol, Cluster: l.Cluster, Split: l.Split}
}

// PickTCP chooses the backend of a TCP listener, as Route.Pick does.
func (l *Listener) PickTCP(rnd uint64) *Backend {
	if len(l.Split) == 0 && l.Cluster != "" {
		return &Backend{Cluster: l.Cluster, Weight: 1}
	}
	return pickBackend(l.Split, rnd)
}

func pickBackend(bs []Backend, rnd uint64) *Backend {
	var total uint64
	for i := range bs {
		total += uint64(bs[i].Weight)
	}
	if total == 0 {
		return nil
	}
	at, _ := bits.Mul64(rnd, total) // uniform in [0, total)
	for i := range bs {
		if w := uint64(bs[i].Weight); at >= w {
			at -= w
			continue
		}
		return &bs[i]
	}
	return nil // unreachable: at < total
}

// Path returns what the backend sees for path (without query), where m is the match that led here.
func (w *Rewrite) Path(m *Match, path string) string {
	return replacePath(m, path, w.ReplacePath, w.ReplacePrefix)
}

// RewriteOf joins the route's rewrite with the backend's, which wins field by field.
func (rt *Route) RewriteOf(b *Backend) Rewrite {
	w := rt.Rewrite
	if b.Rewrite.Host != "" {
		w.Host = b.Rewrite.Host
	}
	if b.Rewrite.ReplacePath != nil || b.Rewrite.ReplacePrefix != nil {
		w.ReplacePath, w.ReplacePrefix = b.Rewrite.ReplacePath, b.Rewrite.ReplacePrefix
	}
	return w
}

// Location returns the Location field of the redirect's answer. scheme is "http" or "https"; authority is the request's Host,
// with or without port (Gateway API, HTTPRequestRedirectFilter).
func (d *Redirect) Location(m *Match, scheme, authority, path, rawQuery string) string {
	host, port := splitPort(authority)
	if d.Host != "" {
		host = d.Host
	}
	switch {
	case d.Port != 0:
		port = strconv.Itoa(int(d.Port))
	case d.Scheme != "": // the well-known port of the new scheme
		port = ""
	}
	if d.Scheme != "" {
		scheme = d.Scheme
	}
	if scheme == "http" && port == "80" || scheme == "https" && port == "443" {
		port = ""
	}
	var b strings.Builder
	b.WriteString(scheme)
	b.WriteString("://")
	b.WriteString(host)
	if port != "" {
		b.WriteByte(':')
		b.WriteString(port)
	}
	p := replacePath(m, path, d.ReplacePath, d.ReplacePrefix)
	if !strings.HasPrefix(p, "/") {
		b.WriteByte('/')
	}
	b.WriteString(p)
	if rawQuery != "" {
		b.WriteByte('?')
		b.WriteString(rawQuery)
	}
	return b.String()
}

// replacePath follows the table at the Gateway API's HTTPPathModifier: trailing slashes of prefix and replacement do not
// count, and the result is never empty.
func replacePath(m *Match, path string, whole, prefix *string) string {
	switch {
	case whole != nil:
		return *whole
	case prefix == nil:
		return path
	}
	if m.PathExact != "" || m.PathRegex != nil || !hasPathPrefix(path, m.PathPrefix) {
		return path // only a prefix can be replaced
	}
	matched := strings.TrimSuffix(m.PathPrefix, "/")
	p := strings.TrimSuffix(*prefix, "/") + path[len(matched):]
	if !strings.HasPrefix(p, "/") {
		p = "/" + p
	}
	return p
}

// splitPort splits host:port; an IPv6 host keeps its brackets.
func splitPort(authority string) (host, port string) {
	i := strings.LastIndexByte(authority, ':')
	if i < 0 || strings.IndexByte(authority[i:], ']') >= 0 {
		return authority, ""
	}
	return authority[:i], authority[i+1:]
}

// HeaderEditor is what edits are applied to; net/http's Header is one.
type HeaderEditor interface {
	Set(name, value string)
	Add(name, value string)
	Del(name string)
}

// Apply changes h: set, then add, then remove.
func (e *HeaderEdits) Apply(h HeaderEditor) {
	for i := range e.Set {
		h.Set(e.Set[i].Name, e.Set[i].Value)
	}
	for i := range e.Add {
		h.Add(e.Add[i].Name, e.Add[i].Value)
	}
	for _, name := range e.Remove {
		h.Del(name)
	}
}
