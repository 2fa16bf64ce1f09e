package inject

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Annotations of a Pod that change its sidecar.
const (
	annotationLogLevel      = "hanse.mesh/proxy-log-level"
	annotationImage         = "hanse.mesh/proxy-image"
	annotationCPU           = "hanse.mesh/proxy-cpu"    // request
	annotationMemory        = "hanse.mesh/proxy-memory" // request
	annotationCPULimit      = "hanse.mesh/proxy-cpu-limit"
	annotationMemoryLimit   = "hanse.mesh/proxy-memory-limit"
	annotationMode          = "hanse.mesh/capture-inbound-mode" // strict or permissive
	annotationExempt        = "hanse.mesh/capture-exempt-ports" // open to callers without identity
	annotationSkipIn        = "hanse.mesh/capture-exclude-inbound-ports"
	annotationSkipOut       = "hanse.mesh/capture-exclude-outbound-ports"
	annotationSkipAddresses = "hanse.mesh/capture-exclude-outbound-cidrs"
	annotationWorkloadAPI   = "hanse.mesh/workload-api" // "true": the application gets the SPIFFE Workload API

	annotationConfig = "hanse.mesh/proxy-config" // written here: the sidecar's configuration
	settingsPrefix   = "hanse.mesh/proxy-"
	capturePrefix    = "hanse.mesh/capture-"
)

// settings are what a Pod's annotations say.
type settings struct {
	logLevel, image          string
	requests, limits         map[string]resource.Quantity
	permissive, workloadAPI  bool
	exempt                   []uint16
	skipIn, skipOut, skipIPs []string
}

// parse reports every fault together, each by annotation and value.
func (s *settings) parse(meta *metav1.ObjectMeta) error {
	s.requests, s.limits = map[string]resource.Quantity{}, map[string]resource.Quantity{}
	quantity := func(into map[string]resource.Quantity, name string) func(string) error {
		return func(v string) error {
			q, err := resource.ParseQuantity(v)
			if err != nil || q.Sign() <= 0 {
				return errors.New("want a quantity such as 100m or 64Mi")
			}
			into[name] = q
			return nil
		}
	}
	choice := func(set func(string), from ...string) func(string) error {
		return func(v string) error {
			if !slices.Contains(from, v) {
				return errors.New("want " + strings.Join(from, " or "))
			}
			set(v)
			return nil
		}
	}
	known := map[string]func(string) error{
		annotationLogLevel:    choice(func(v string) { s.logLevel = v }, "debug", "info", "warn", "error"),
		annotationImage:       func(v string) error { s.image = v; return nil },
		annotationCPU:         quantity(s.requests, "cpu"),
		annotationMemory:      quantity(s.requests, "memory"),
		annotationCPULimit:    quantity(s.limits, "cpu"),
		annotationMemoryLimit: quantity(s.limits, "memory"),
		annotationMode:        choice(func(v string) { s.permissive = v == "permissive" }, "strict", "permissive"),
		annotationWorkloadAPI: choice(func(v string) { s.workloadAPI = v == "true" }, "true", "false"),
		annotationExempt: func(v string) error {
			for _, p := range list(v) {
				n, err := strconv.ParseUint(p, 10, 16)
				if err != nil || n == 0 {
					return fmt.Errorf("%q is not a port", p)
				}
				s.exempt = append(s.exempt, uint16(n))
			}
			return nil
		},
		annotationSkipIn:  func(v string) error { s.skipIn = list(v); return ranges(s.skipIn) },
		annotationSkipOut: func(v string) error { s.skipOut = list(v); return ranges(s.skipOut) },
		annotationSkipAddresses: func(v string) error {
			s.skipIPs = list(v)
			for _, p := range s.skipIPs {
				if _, err := netip.ParsePrefix(p); err != nil {
					return fmt.Errorf("%q is not a range such as 10.0.0.0/8", p)
				}
			}
			return nil
		},
		annotationConfig: func(string) error { return errors.New("is written by the injector: leave it out") },
	}
	var faults []error
	for _, name := range slices.Sorted(maps.Keys(meta.Annotations)) {
		v := meta.Annotations[name]
		read := known[name]
		switch {
		case read != nil:
			if err := read(v); err != nil {
				faults = append(faults, fmt.Errorf("annotation %s: %q: %w", name, v, err))
			}
		case strings.HasPrefix(name, settingsPrefix), strings.HasPrefix(name, capturePrefix):
			faults = append(faults, fmt.Errorf("annotation %s: there is none of this name: want one of %s", name, strings.Join(slices.DeleteFunc(slices.Sorted(maps.Keys(known)), func(k string) bool { return k == annotationConfig }), ", ")))
		}
	}
	return errors.Join(faults...)
}

func list(v string) (out []string) {
	for p := range strings.SplitSeq(v, ",") {
		if p = strings.TrimSpace(p); p != "" {
			out = append(out, p)
		}
	}
	return out
}

func ranges(of []string) error {
	for _, r := range of {
		first, last, isRange := strings.Cut(r, "-")
		a, err := strconv.ParseUint(first, 10, 16)
		b := a
		if err == nil && isRange {
			b, err = strconv.ParseUint(last, 10, 16)
		}
		if err != nil || a == 0 || b < a {
			return fmt.Errorf("%q is not a port or a range such as 9000-9100", r)
		}
	}
	return nil
}
