package dns

import (
	"net/netip"
	"strings"

	"github.com/hanse-mesh/hanse/proxy"
)

// Zones, lower case, as names on the wire are written.
const (
	zone     = "clusterset.local."
	services = "svc." + zone
)

// question is a name of the mesh, taken apart.
type question struct {
	kind     kind
	host     string // payments.shop.svc.clusterset.local
	port     string // of _http._tcp.…
	hostname string // of one endpoint
	cluster  string
	short    bool // written without clusterset.local: perhaps another's name
}

type kind int

const (
	foreign     kind = iota // not of the mesh
	nothing                 // cannot be of a service
	version                 // dns-version.clusterset.local
	between                 // a name that only has names below it
	service                 // <service>.<namespace>.svc.clusterset.local
	servicePort             // _<port>._tcp.<service>…
	protocol                // _tcp.<service>…
	cluster                 // <cluster>.<service>…
	endpoint                // <hostname>.<cluster>.<service>…
)

// parse reads a lower-case name that ends in a dot. Where namespace is not empty, short names are the mesh's, too: "payments" is in that
// namespace.
func parse(name, namespace string) question {
	if name == zone || name == services {
		return question{kind: between}
	}
	if name == "dns-version."+zone {
		return question{kind: version}
	}
	rest, ok := strings.CutSuffix(name, "."+services)
	switch {
	case ok:
		return parseService(strings.Split(rest, "."))
	case strings.HasSuffix(name, "."+zone):
		return question{kind: nothing}
	case namespace == "" || name == ".":
		return question{}
	}
	labels := strings.Split(strings.TrimSuffix(name, "."), ".")
	switch {
	case len(labels) == 1:
		labels = append(labels, namespace)
	case len(labels) == 3 && labels[2] == "svc":
		labels = labels[:2]
	case len(labels) != 2:
		return question{}
	}
	if q := parseService(labels); q.kind == service && labels[0] != "localhost" {
		q.short = true
		return q
	}
	return question{}
}

func parseService(labels []string) question {
	n := len(labels)
	if n == 1 && isLabel(labels[0]) {
		return question{kind: between} // a namespace; which there are, nobody says
	}
	if n < 2 || !isLabel(labels[n-1]) || !isLabel(labels[n-2]) {
		return question{kind: nothing}
	}
	q := question{kind: service, host: labels[n-2] + "." + labels[n-1] + "." + strings.TrimSuffix(services, ".")}
	switch below := labels[:n-2]; len(below) {
	case 0:
	case 1:
		q.kind = nothing
		if below[0] == "_tcp" {
			q.kind = protocol
		} else if isLabel(below[0]) {
			q.kind, q.cluster = cluster, below[0]
		}
	case 2:
		q.kind = nothing
		if port, ok := strings.CutPrefix(below[0], "_"); ok && below[1] == "_tcp" {
			q.kind, q.port = servicePort, port
		} else if isLabel(below[0]) && isLabel(below[1]) {
			q.kind, q.hostname, q.cluster = endpoint, below[0], below[1]
		}
	default:
		q.kind = nothing
	}
	return q
}

// isLabel reports whether s is a DNS label as Kubernetes has them (RFC 1123), lower case.
func isLabel(s string) bool {
	if s == "" || len(s) > 63 || s[0] == '-' || s[len(s)-1] == '-' {
		return false
	}
	for i := range len(s) {
		if c := s[i]; (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' {
			return false
		}
	}
	return true
}

// hostname is the first label of an endpoint's own name: its host name, or its address with dashes.
func hostname(e *proxy.ServiceEndpoint) string {
	if h := strings.ToLower(e.Hostname); isLabel(h) {
		return h
	}
	if e.Address.Is4() {
		return strings.ReplaceAll(e.Address.String(), ".", "-")
	}
	return strings.ReplaceAll(e.Address.StringExpanded(), ":", "-")
}

// reverse reads the address in a name of in-addr.arpa or ip6.arpa, lower case.
func reverse(name string) (netip.Addr, bool) {
	if rest, ok := strings.CutSuffix(name, ".in-addr.arpa."); ok {
		l := strings.Split(rest, ".")
		if len(l) != 4 {
			return netip.Addr{}, false
		}
		a, err := netip.ParseAddr(l[3] + "." + l[2] + "." + l[1] + "." + l[0])
		return a, err == nil
	}
	rest, ok := strings.CutSuffix(name, ".ip6.arpa.")
	if !ok || len(rest) != 63 {
		return netip.Addr{}, false
	}
	var b strings.Builder
	for i := 62; i >= 0; i -= 2 {
		b.WriteByte(rest[i])
		if i%8 == 0 && i > 0 {
			b.WriteByte(':')
		}
		if i > 0 && rest[i-1] != '.' {
			return netip.Addr{}, false
		}
	}
	a, err := netip.ParseAddr(b.String())
	return a, err == nil && a.Is6()
}

// Host is the whole name of a service as it may be written short, "payments.shop" or "payments" in namespace; "" where it is none.
func Host(written, namespace string) string {
	q := parse(strings.ToLower(strings.TrimSuffix(written, "."))+".", namespace)
	if q.kind != service {
		return ""
	}
	return q.host
}
