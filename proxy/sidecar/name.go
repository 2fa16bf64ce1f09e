package sidecar

import (
	"fmt"
	"maps"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
)

// names remembers what names mean: an application writes few of them, often.
type names struct {
	known atomic.Pointer[map[writtenName]string]
	mu    sync.Mutex // held to add
}

type writtenName struct {
	name string
	port uint16
}

// maxNames bounds what is remembered; a caller's inventions beyond are worked out each time.
const maxNames = 1024

func (n *names) authorityOf(written, namespace string, defaultPort uint16) (string, error) {
	k := writtenName{written, defaultPort}
	known := n.known.Load()
	if known != nil {
		if a, ok := (*known)[k]; ok {
			return a, nil
		}
	}
	a, err := authorityOf(written, namespace, defaultPort)
	if err != nil {
		return "", err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	next := map[writtenName]string{}
	if known = n.known.Load(); known != nil {
		next = maps.Clone(*known)
	}
	if len(next) < maxNames {
		next[writtenName{strings.Clone(written), defaultPort}] = a
		n.known.Store(&next)
	}
	return a, nil
}

const (
	clustersetSuffix = ".svc.clusterset.local"
	clusterSuffix    = ".svc.cluster.local"
)

// authorityOf turns what a caller wrote into the name of a Listener: "payments", "payments.shop", "payments.shop.svc" and
// "payments.shop.svc.clusterset.local", each with or without port, become "payments.shop.svc.clusterset.local:8080". A name
// without namespace is in the caller's own. "….svc.cluster.local" stays.
func authorityOf(written, namespace string, defaultPort uint16) (string, error) {
	host, port := written, defaultPort
	if i := strings.LastIndexByte(written, ':'); i >= 0 {
		p, err := strconv.ParseUint(written[i+1:], 10, 16)
		if err != nil || p == 0 || written[i+1] == '+' {
			return "", fmt.Errorf("%q is not a service name: bad port", written)
		}
		host, port = written[:i], uint16(p)
	}
	host = strings.ToLower(strings.TrimSuffix(host, "."))
	if _, err := netip.ParseAddr(strings.Trim(host, "[]")); err == nil {
		return "", fmt.Errorf("%q is an address, not a service name", written)
	}
	suffix := clustersetSuffix
	switch {
	case strings.HasSuffix(host, clustersetSuffix):
		host = strings.TrimSuffix(host, clustersetSuffix)
	case strings.HasSuffix(host, clusterSuffix):
		host, suffix = strings.TrimSuffix(host, clusterSuffix), clusterSuffix
	default:
		host = strings.TrimSuffix(host, ".svc")
	}
	service, ns, dotted := strings.Cut(host, ".")
	if !dotted {
		ns = namespace
	}
	if !label(service) || !label(ns) {
		return "", fmt.Errorf("%q is not a service name", written)
	}
	return service + "." + ns + suffix + ":" + strconv.Itoa(int(port)), nil
}

// label reports whether s is a DNS label (RFC 1123).
func label(s string) bool {
	if s == "" || len(s) > 63 || s[0] == '-' || s[len(s)-1] == '-' {
		return false
	}
	for i := range len(s) {
		if c := s[i]; !(c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || c == '-') {
			return false
		}
	}
	return true
}
