package federation

import (
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"

	"github.com/hanse-mesh/hanse/discovery"
)

// Bounds of what a service takes along for its ServiceImport.
const (
	MaxLabels      = 64       // labels, and as many annotations, of an export
	MaxAnnotations = 16 << 10 // bytes of all annotations of an export together
	maxAffinity    = 86_400   // seconds; Kubernetes' own bound
)

// checkTraits bounds what is sent and what is believed. t is Normal.
func checkTraits(t discovery.Traits) error {
	switch {
	case t.Affinity != "" && t.Affinity != "ClientIP":
		return fmt.Errorf("session affinity %.40q is unknown", t.Affinity)
	case t.AffinityTimeout > maxAffinity:
		return fmt.Errorf("session affinity of %d s, at most %d are possible", t.AffinityTimeout, maxAffinity)
	case t.InternalTrafficPolicy != "" && t.InternalTrafficPolicy != "Local":
		return fmt.Errorf("internal traffic policy %.40q is unknown", t.InternalTrafficPolicy)
	case t.TrafficDistribution != "" && !qualifiedName(t.TrafficDistribution):
		return fmt.Errorf("traffic distribution %.80q is not a word", t.TrafficDistribution)
	case len(t.IPFamilies) > 2 || len(t.IPFamilies) == 2 && t.IPFamilies[0] == t.IPFamilies[1]:
		return fmt.Errorf("%d IP families, or the same twice", len(t.IPFamilies))
	}
	for _, f := range t.IPFamilies {
		if f != discovery.IPv4 && f != discovery.IPv6 {
			return fmt.Errorf("IP family %.40q is unknown", f)
		}
	}
	return nil
}

// reservedMetadata are prefixes of keys that mean something to control planes: no cluster sets them in another.
var reservedMetadata = []string{"hanse.mesh/", "multicluster.kubernetes.io/", "multicluster.x-k8s.io/"}

// checkMetadata holds labels and annotations to Kubernetes' syntax, so that whoever imports them can write them.
func checkMetadata(labels, annotations map[string]string) error {
	if len(labels) > MaxLabels || len(annotations) > MaxLabels {
		return fmt.Errorf("%d labels and %d annotations, at most %d of each can be exported", len(labels), len(annotations), MaxLabels)
	}
	size := 0
	for _, kind := range []struct {
		name string
		of   map[string]string
	}{{"label", labels}, {"annotation", annotations}} {
		for _, k := range slices.Sorted(maps.Keys(kind.of)) {
			if !qualifiedName(k) {
				return fmt.Errorf("%s %.80q is not a qualified name", kind.name, k)
			}
			if slices.ContainsFunc(reservedMetadata, func(p string) bool { return strings.HasPrefix(k, p) }) {
				return fmt.Errorf("%s %s is reserved for control planes and cannot be exported", kind.name, k)
			}
		}
	}
	for _, k := range slices.Sorted(maps.Keys(labels)) {
		if !labelValue.MatchString(labels[k]) {
			return fmt.Errorf("label %s: %.80q is not a label's value", k, labels[k])
		}
	}
	for k, v := range annotations {
		size += len(k) + len(v)
	}
	if size > MaxAnnotations {
		return fmt.Errorf("annotations of %d bytes, at most %d can be exported", size, MaxAnnotations)
	}
	return nil
}

var (
	labelValue   = regexp.MustCompile(`^([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?$`)
	plainName    = regexp.MustCompile(`^[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$`)
	dnsSubdomain = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$`)
)

// qualifiedName reports whether s is "name" or "dns.subdomain/name", as Kubernetes' labels and annotations are called.
func qualifiedName(s string) bool {
	if prefix, name, ok := strings.Cut(s, "/"); ok {
		return len(prefix) <= maxString && dnsSubdomain.MatchString(prefix) && plainName.MatchString(name)
	}
	return plainName.MatchString(s)
}
