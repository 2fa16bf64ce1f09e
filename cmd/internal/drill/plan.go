package drill

import (
	"cmp"
	"fmt"
	"hash/fnv"
	"slices"
	"strings"
	"time"

	"github.com/hanse-mesh/hanse/cmd/internal/admin"
	"github.com/hanse-mesh/hanse/discovery"
	"github.com/hanse-mesh/hanse/discovery/v1alpha1"
)

// Modes of a drill. The first five act in sidecars, distrust-root also in the control plane, the last three there alone.
const (
	Drain               = v1alpha1.DrillDrain
	Blackhole           = v1alpha1.DrillBlackhole
	Errors              = v1alpha1.DrillErrors
	Slow                = v1alpha1.DrillSlow
	ExpireCertificates  = v1alpha1.DrillExpireCertificates
	DistrustRoot        = v1alpha1.DrillDistrustRoot
	SilenceControlPlane = v1alpha1.DrillSilenceControlPlane
	CutFederation       = v1alpha1.DrillCutFederation
	Rotate              = v1alpha1.DrillRotate
)

// Modes lists all of them.
func Modes() []string {
	return v1alpha1.DrillModes()
}

// inControlPlane reports whether a mode acts there; there is one such drill at a time.
func inControlPlane(mode string) bool {
	return mode == SilenceControlPlane || mode == CutFederation || mode == Rotate || mode == DistrustRoot
}

// inSidecars reports whether a mode acts there.
func inSidecars(mode string) bool { return !inControlPlane(mode) || mode == DistrustRoot }

const (
	defaultFor     = 2 * time.Minute
	defaultGuard   = "success<99%"
	defaultLatency = 500 * time.Millisecond
	defaultStatus  = 503
)

// Complete fills in defaults and refuses what cannot be run. self is the name of this cluster.
func Complete(spec admin.DrillSpec, self string) (admin.DrillSpec, error) {
	if !slices.Contains(Modes(), spec.Mode) {
		return spec, fmt.Errorf("drill mode %q: want one of %s", spec.Mode, strings.Join(Modes(), ", "))
	}
	spec.Scope.Cluster = cmp.Or(spec.Scope.Cluster, self)
	if spec.Scope.Cluster != self {
		return spec, fmt.Errorf("drill scope cluster %q: this control plane drills only its own cluster %q; run it there (hanse --context %s drill run …)",
			spec.Scope.Cluster, self, spec.Scope.Cluster)
	}
	if spec.For == 0 {
		spec.For = defaultFor.Seconds()
	}
	if d := seconds(spec.For); d < v1alpha1.MinDrill || d > v1alpha1.MaxDrill {
		return spec, fmt.Errorf("drill duration %s: want between %s and %s", d, v1alpha1.MinDrill, v1alpha1.MaxDrill)
	}
	spec.AbortIf = cmp.Or(spec.AbortIf, defaultGuard)
	if _, err := ParseGuard(spec.AbortIf); err != nil {
		return spec, err
	}
	if spec.Scope.Share > 100 {
		return spec, fmt.Errorf("drill share %d: want 1 to 100 percent", spec.Scope.Share)
	}
	spec.Scope.Share = cmp.Or(spec.Scope.Share, 100)
	if spec.Scope.Service != "" && strings.Count(spec.Scope.Service, "/") != 1 {
		return spec, fmt.Errorf("drill scope service %q: want namespace/name", spec.Scope.Service)
	}
	if spec.Mode != DistrustRoot && spec.Root != "" {
		return spec, fmt.Errorf("drill root %q: it has a meaning only in mode %s", spec.Root, DistrustRoot)
	}
	switch spec.Mode {
	case DistrustRoot:
		if spec.Root == "" {
			return spec, fmt.Errorf("drill root: mode %s distrusts a trust domain or one of its authorities; name it (--root east.demo)", DistrustRoot)
		}
	case Rotate:
		if s := spec.Scope; s.Region != "" || s.Zone != "" || s.Service != "" || s.Share < 100 {
			return spec, fmt.Errorf("drill scope %s: mode %s concerns a whole cluster; leave region, zone, service and share out", scopeText(s), Rotate)
		}
	case Slow:
		spec.Latency = cmp.Or(spec.Latency, defaultLatency.Seconds())
	case Errors:
		spec.Status = cmp.Or(spec.Status, defaultStatus)
		if spec.Status < 400 || spec.Status > 599 {
			return spec, fmt.Errorf("drill error status %d: want 400 to 599", spec.Status)
		}
	}
	return spec, nil
}

// Hits reports whether the drill hits an endpoint of a service. Of drain and blackhole, Share is a share of the endpoints;
// of errors and slow it is one of the requests, and every endpoint is hit.
func Hits(spec admin.DrillSpec, service discovery.Name, e *discovery.Endpoint) bool {
	s := spec.Scope
	switch {
	case !inSidecars(spec.Mode):
		return false
	case s.Cluster != e.Locality.Cluster:
		return false
	case s.Region != "" && s.Region != e.Locality.Region:
		return false
	case s.Zone != "" && s.Zone != e.Locality.Zone:
		return false
	case s.Service != "" && s.Service != service.String():
		return false
	case spec.Mode == Errors || spec.Mode == Slow || s.Share == 0 || s.Share >= 100:
		return true
	}
	h := fnv.New32a()
	h.Write([]byte(e.ID))
	return h.Sum32()%100 < s.Share
}

// Plan says who would take over each service that the drill hits. spec must be complete.
func Plan(spec admin.DrillSpec, cs *discovery.Clusterset) admin.DrillPlan {
	plan := admin.DrillPlan{Spec: spec, Covered: true, Guard: "abort if " + spec.AbortIf + " over 10s, for the callers in this cluster together"}
	if spec.Mode == Rotate {
		plan.Summary = fmt.Sprintf("Would replace the root of %s within %s: prepare the next, let it sign when all have loaded it, renew every SVID, drop the old one. No call should fail, and nothing is undone at the end.",
			spec.Scope.Cluster, seconds(spec.For))
		return plan
	}
	if spec.Mode == DistrustRoot {
		return planDistrust(plan, cs)
	}
	if !inSidecars(spec.Mode) {
		plan.Summary = fmt.Sprintf("Would %s of %s for %s; no endpoint is touched, peers keep what they know.",
			map[string]string{SilenceControlPlane: "silence the control plane", CutFederation: "cut the federation links"}[spec.Mode],
			spec.Scope.Cluster, seconds(spec.For))
		return plan
	}
	for _, name := range cs.Local.Services.Names() {
		if c := cover(spec, cs, cs.Local.Services.Get(name)); c.Hit > 0 {
			plan.Endpoints += c.Hit
			plan.Covered = plan.Covered && c.Covered
			plan.Services = append(plan.Services, c)
		}
	}
	plan.Summary = fmt.Sprintf("Would %s %d endpoints of %s for %s.", verb(spec), plan.Endpoints, scopeText(spec.Scope), seconds(spec.For))
	if plan.Endpoints == 0 {
		plan.Covered = false
		plan.Summary = fmt.Sprintf("Nothing to drill: no endpoint of %s matches.", scopeText(spec.Scope))
	}
	return plan
}

// planDistrust says whose endpoints would be refused. An authority is not told apart: what rests on it is in no Snapshot.
func planDistrust(plan admin.DrillPlan, cs *discovery.Clusterset) admin.DrillPlan {
	hit := map[string]bool{}
	for id := range resting(plan.Spec, cs) {
		hit[id] = true
	}
	for _, name := range cs.Imports.Names() {
		c := admin.DrillCovered{Service: name.String()}
		for _, from := range cs.Imports.Get(name).From {
			left := 0
			for _, e := range from.Endpoints {
				switch {
				case hit[e.ID]:
					c.Hit++
				case e.Ready && !e.Draining:
					left++
				}
			}
			if left > 0 {
				c.Left += left
				c.Takers = append(c.Takers, fmt.Sprintf("%s (%d healthy)", from.Member, left))
			}
		}
		if c.Hit == 0 {
			continue
		}
		if c.Covered = c.Left > 0; !c.Covered {
			c.Note = "nobody else serves it: callers will fail"
		}
		plan.Covered = plan.Covered && c.Covered
		plan.Endpoints += c.Hit
		plan.Services = append(plan.Services, c)
	}
	plan.Summary = fmt.Sprintf("Would refuse what rests on %s for %s, in the sidecars of %s and, for a whole cluster, in hansed: %d endpoints, and the callers of that trust domain.",
		plan.Spec.Root, seconds(plan.Spec.For), scopeText(plan.Spec.Scope), plan.Endpoints)
	return plan
}

// resting are the imported endpoints whose IDs are of the trust domain that a drill distrusts, and their services.
func resting(spec admin.DrillSpec, cs *discovery.Clusterset) map[string]discovery.Name {
	td, _, _ := strings.Cut(spec.Root, "/")
	out := map[string]discovery.Name{}
	for name, imp := range cs.Imports.All() {
		for _, from := range imp.From {
			for _, e := range from.Endpoints {
				if strings.HasPrefix(e.SPIFFEID, "spiffe://"+td+"/") {
					out[e.ID] = name
				}
			}
		}
	}
	return out
}

func cover(spec admin.DrillSpec, cs *discovery.Clusterset, svc *discovery.Service) admin.DrillCovered {
	c := admin.DrillCovered{Service: svc.String()}
	byZone := map[string]int{}
	for _, e := range svc.Endpoints {
		switch {
		case Hits(spec, svc.Name, e):
			c.Hit++
		case e.Ready && !e.Draining:
			c.Left++
			byZone[strings.TrimSpace(e.Locality.Cluster+" "+e.Locality.Zone)]++
		}
	}
	for _, where := range sortedKeys(byZone) {
		c.Takers = append(c.Takers, fmt.Sprintf("%s (%d healthy)", where, byZone[where]))
	}
	if imp := cs.Imports.Get(svc.Name); imp != nil {
		for _, from := range imp.From {
			if from.Member == cs.Local.Self.Cluster {
				continue
			}
			ready := 0
			for _, e := range from.Endpoints {
				if e.Ready && !e.Draining {
					ready++
				}
			}
			if m := cs.Members[from.Member]; ready > 0 && m != nil && m.State != discovery.Withdrawn {
				c.Left += ready
				note := ""
				if m.State == discovery.Suspect {
					note = ", suspect"
				}
				c.Takers = append(c.Takers, fmt.Sprintf("%s (%d healthy%s)", from.Member, ready, note))
			}
		}
	}
	gentle := spec.Mode == Slow || spec.Mode == Errors && spec.Scope.Share < 100
	c.Covered = c.Left > 0 || gentle
	switch {
	case !c.Covered:
		c.Note = "nobody can take over: callers will fail"
	case c.Left > 0 && c.Left < c.Hit:
		c.Note = fmt.Sprintf("%d endpoints take the load of %d more", c.Left, c.Hit)
	}
	return c
}

func verb(spec admin.DrillSpec) string {
	switch spec.Mode {
	case Drain:
		return "drain"
	case Blackhole:
		return "black-hole"
	case ExpireCertificates:
		return "let the certificates expire of"
	case Slow:
		return fmt.Sprintf("add %s to %d%% of the requests at", seconds(spec.Latency), spec.Scope.Share)
	default:
		return fmt.Sprintf("answer %d%% of the requests with %d at", spec.Scope.Share, spec.Status)
	}
}

func scopeText(s admin.DrillScope) string {
	var parts []string
	if s.Service != "" {
		parts = append(parts, s.Service)
	}
	for _, p := range []struct{ name, value string }{{"zone", s.Zone}, {"region", s.Region}} {
		if p.value != "" {
			parts = append(parts, p.name+" "+p.value)
		}
	}
	return strings.Join(append(parts, "cluster "+s.Cluster), " in ")
}

func seconds(s float64) time.Duration { return time.Duration(s * float64(time.Second)) }

func sortedKeys[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}
