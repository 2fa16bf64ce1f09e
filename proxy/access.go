package proxy

import "strings"

// Decision says whether a request may enter, and which policy said so.
type Decision struct {
	Allow  bool
	Policy string // that decided; empty where the default did
	Reason string // in words, for the access log

	// Audit names an audit-mode policy that matched, or whose enforcement would have changed Allow to AuditAllow.
	Audit      string
	AuditAllow bool
}

// Check decides on a request by its caller's verified SPIFFE ID. method and path (without query) are empty for TCP.
//
// Deny rules come first, whatever the caller's trust domain; then allow rules, of which only those marked Foreign match a
// caller of another trust domain; then the default, which never allows one. A path is read twice, as received and as an
// application may normalise it ("%2e", "//", "\"): a deny rule matches if either reading does, an allow rule if both do.
// For TCP, methods and paths hold in deny rules and do not in allow rules.
func (a *Access) Check(caller, method, path string) Decision {
	td, ok := trustDomain(caller)
	if !ok {
		return Decision{Reason: "caller has no SPIFFE ID"}
	}
	c := call{id: caller, foreign: td != a.TrustDomain, method: method, path: path, normal: path}
	if !plainPath(path) {
		c.normal = normalisePath(path)
	}
	d := a.decide(&c)
	if len(a.AuditDeny)+len(a.AuditAllow) > 0 {
		a.audit(&c, &d)
	}
	return d
}

func (a *Access) decide(c *call) Decision {
	if r := c.denied(a.Deny); r != nil {
		return Decision{Policy: r.Policy, Reason: "denied by a rule"}
	}
	if r := c.allowed(a.Allow); r != nil {
		return Decision{Allow: true, Policy: r.Policy, Reason: "allowed by a rule"}
	}
	switch {
	case c.foreign:
		return Decision{Reason: "caller of another trust domain, and no rule of an exported service allows it"}
	case a.DefaultAllow:
		return Decision{Allow: true, Reason: "no policy selects the service"}
	}
	return Decision{Reason: "no rule allows the caller"}
}

// audit says what the decision would be if the audit rules were in force.
func (a *Access) audit(c *call, d *Decision) {
	if r := c.denied(a.AuditDeny); r != nil {
		d.Audit = r.Policy
		return
	}
	if d.Policy != "" && !d.Allow {
		return // denied by an enforced rule in any case
	}
	if r := c.allowed(a.AuditAllow); r != nil {
		d.Audit, d.AuditAllow = r.Policy, true
		return
	}
	if d.Allow && d.Policy == "" && len(a.AuditAllow) > 0 {
		d.Audit = a.AuditAllow[0].Policy // with it the default would be gone
	}
}

// call is one request in the two readings of its path.
type call struct {
	id           string
	foreign      bool
	method       string
	path, normal string
}

func (c *call) denied(rules []AccessRule) *AccessRule {
	for i := range rules {
		r := &rules[i]
		if c.from(r) && (c.method == "" || c.methodIn(r) && (pathIn(r, c.path) || pathIn(r, c.normal))) {
			return r
		}
	}
	return nil
}

func (c *call) allowed(rules []AccessRule) *AccessRule {
	for i := range rules {
		r := &rules[i]
		if (r.Foreign || !c.foreign) && c.from(r) && c.methodIn(r) && pathIn(r, c.path) && pathIn(r, c.normal) {
			return r
		}
	}
	return nil
}

func (c *call) from(r *AccessRule) bool {
	for _, p := range r.From {
		if MatchID(p, c.id) {
			return true
		}
	}
	return len(r.From) == 0
}

func (c *call) methodIn(r *AccessRule) bool {
	for _, m := range r.Methods {
		if m == c.method {
			return true
		}
	}
	return len(r.Methods) == 0
}

func pathIn(r *AccessRule, path string) bool {
	for _, p := range r.Paths {
		if prefix, ok := strings.CutSuffix(p, "*"); ok {
			if path != "" && strings.HasPrefix(path, prefix) {
				return true
			}
		} else if path == p && path != "" {
			return true
		}
	}
	return len(r.Paths) == 0
}

// MatchID reports whether a SPIFFE ID matches a pattern, as identity.MatchPattern does: "*" stands for one whole segment or
// the trust domain, a last "**" for any number of further segments. It does not allocate.
func MatchID(pattern, id string) bool {
	p, ok := strings.CutPrefix(pattern, "spiffe://")
	if !ok {
		return false
	}
	s, ok := strings.CutPrefix(id, "spiffe://")
	if !ok {
		return false
	}
	for more := true; ; {
		seg, rest, morePattern := strings.Cut(p, "/")
		if seg == "**" && !morePattern {
			return true
		}
		if !more {
			return false
		}
		var have string
		have, s, more = strings.Cut(s, "/")
		if seg != "*" && seg != have {
			return false
		}
		if !morePattern {
			return !more
		}
		p = rest
	}
}

func trustDomain(id string) (string, bool) {
	s, ok := strings.CutPrefix(id, "spiffe://")
	if !ok {
		return "", false
	}
	td, _, _ := strings.Cut(s, "/")
	return td, td != ""
}

// plainPath reports whether every application reads the path as it was received.
func plainPath(p string) bool {
	for i := 0; i < len(p); i++ {
		switch p[i] {
		case '%', '\\', ';':
			return false
		case '/':
			if i+1 < len(p) && (p[i+1] == '/' || p[i+1] == '.') {
				return false
			}
		}
	}
	return true
}

// normalisePath decodes percent-encoding, turns "\" into "/", drops parameters (";…") and empty segments and resolves dot
// segments (RFC 3986 §5.2.4). A trailing slash stays.
func normalisePath(p string) string {
	p = strings.ReplaceAll(percentDecode(p), `\`, "/")
	var out []string
	slash := false
	for seg := range strings.SplitSeq(p, "/") {
		seg, _, _ = strings.Cut(seg, ";")
		slash = seg == "" || seg == "." || seg == ".."
		switch seg {
		case "", ".":
		case "..":
			if len(out) > 0 {
				out = out[:len(out)-1]
			}
		default:
			out = append(out, seg)
		}
	}
	n := "/" + strings.Join(out, "/")
	if slash && len(out) > 0 {
		n += "/"
	}
	return n
}

// percentDecode decodes every well-formed escape and leaves others as they are.
func percentDecode(s string) string {
	if strings.IndexByte(s, '%') < 0 {
		return s
	}
	b := make([]byte, 0, len(s))
	for i := 0; i < len(s); i++ {
		if s[i] == '%' && i+2 < len(s) {
			hi, okHi := unhex(s[i+1])
			lo, okLo := unhex(s[i+2])
			if okHi && okLo {
				b = append(b, hi<<4|lo)
				i += 2
				continue
			}
		}
		b = append(b, s[i])
	}
	return string(b)
}

func unhex(c byte) (byte, bool) {
	switch {
	case '0' <= c && c <= '9':
		return c - '0', true
	case 'a' <= c && c <= 'f':
		return c - 'a' + 10, true
	case 'A' <= c && c <= 'F':
		return c - 'A' + 10, true
	}
	return 0, false
}
