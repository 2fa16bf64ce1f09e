package federation

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strconv"

	"github.com/hanse-mesh/hanse/discovery"
)

// Conflict reasons of the MCS API (ServiceExport condition Conflict).
const (
	PortConflict                  = "PortConflict"
	TypeConflict                  = "TypeConflict"
	SessionAffinityConflict       = "SessionAffinityConflict"
	SessionAffinityConfigConflict = "SessionAffinityConfigConflict"
	InternalTrafficPolicyConflict = "InternalTrafficPolicyConflict"
	TrafficDistributionConflict   = "TrafficDistributionConflict"
	IPFamilyConflict              = "IPFamilyConflict"
	LabelsConflict                = "LabelsConflict"
	AnnotationsConflict           = "AnnotationsConflict"
)

// Source is one cluster's share of a Merge.
type Source struct {
	ID   string // member ID
	Name string
	Part *Part
}

// LocalPart returns a cluster's own exports as a Part, with the export times that Encode has kept. prev (may be nil) is the result before;
// an Export to which nothing changed is reused, and costs nothing.
func LocalPart(s *discovery.Snapshot, e *Exports, prev *Part) *Part {
	if prev == nil {
		prev = &Part{}
	}
	p := &Part{Endpoints: prev.Endpoints, services: s.Services}
	if e != nil {
		p.exported = e.services
	}
	exports := prev.Exports.Edit()
	update := func(name discovery.Name) {
		if old := exports.Get(name); old != nil {
			p.Endpoints -= len(old.Endpoints)
			exports.Delete(name)
		}
		svc := s.Services.Get(name)
		if svc == nil || svc.Export == nil {
			return
		}
		since := e.Since(name)
		if since.IsZero() {
			since = Stamp(svc.Export.Created)
		}
		p.Endpoints += len(svc.Endpoints)
		x := prev.Exports.Get(name)
		if x == nil || prev.services.Get(name) != svc || !x.Exported.Equal(since) {
			x = &Export{
				Traits: svc.Traits.Normal(), Ports: svc.Ports, Labels: svc.Export.Labels, Annotations: svc.Export.Annotations,
				Exported: since, Endpoints: svc.Endpoints,
			}
		}
		exports.Put(name, x)
	}
	discovery.Diff(prev.services, s.Services, func(n discovery.Name, _, _ *discovery.Service) { update(n) })
	discovery.Diff(prev.exported, p.exported, func(n discovery.Name, _, _ *exported) { update(n) })
	p.Exports = exports.Done()
	return p
}

// share is one source's export of one service.
type share struct {
	*Source
	*Export
}

// Merge makes one Import of all exports of the same name (KEP-1645 "Constraints and conflict resolution"): the union of ports, and where
// exports disagree, the oldest wins; of equally old ones, the smaller member ID. The order of sources does not matter.
// prev (may be nil) is the result before; an Import to which nothing changed is reused, and costs nothing where no Export
// of it is another one.
func Merge(sources []Source, prev *Merged) *Merged {
	if prev == nil {
		prev = &Merged{}
	}
	next := &Merged{sources: slices.Clone(sources)}
	slices.SortFunc(next.sources, func(a, b Source) int { return cmp.Compare(a.ID, b.ID) })
	differ := map[discovery.Name]struct{}{}
	if slices.EqualFunc(prev.sources, next.sources, func(a, b Source) bool { return a.ID == b.ID && a.Name == b.Name }) {
		for i := range next.sources {
			discovery.Diff(prev.sources[i].Part.Exports, next.sources[i].Part.Exports, func(n discovery.Name, _, _ *Export) { differ[n] = struct{}{} })
		}
	} else {
		for n := range prev.Imports.All() {
			differ[n] = struct{}{}
		}
		for i := range next.sources {
			for n := range next.sources[i].Part.Exports.All() {
				differ[n] = struct{}{}
			}
		}
	}
	imports := prev.Imports.Edit()
	var from []share
	for name := range differ {
		from = from[:0]
		for i := range next.sources {
			s := &next.sources[i]
			if e := s.Part.Exports.Get(name); e != nil {
				from = append(from, share{s, e})
			}
		}
		if len(from) == 0 {
			imports.Delete(name)
			continue
		}
		slices.SortFunc(from, func(a, b share) int {
			return cmp.Or(a.Exported.Compare(b.Exported), cmp.Compare(a.ID, b.ID))
		})
		if old, imp := imports.Get(name), mergeOne(name, from); old == nil || !sameImport(old, imp) {
			imports.Put(name, imp)
		}
	}
	next.Imports = imports.Done()
	return next
}

// Merged is the result of a Merge. It is immutable.
type Merged struct {
	Imports discovery.ByName[*discovery.Import]

	sources []Source // of which it was made; sorted by ID
}

// mergeOne merges exports that are sorted by age.
func mergeOne(name discovery.Name, from []share) *discovery.Import {
	oldest := from[0]
	imp := &discovery.Import{
		Name: name, Traits: oldest.Traits, Labels: oldest.Labels, Annotations: oldest.Annotations,
		From: make([]discovery.ImportedFrom, 0, len(from)),
	}
	imp.IPFamilies = families(from)
	var declared []string // who declared imp.Ports[i]
	for _, s := range from {
		conflict := func(with, reason, format string, args ...any) {
			imp.Conflicts = append(imp.Conflicts, discovery.ImportConflict{Member: s.Name, With: with, Reason: reason, Message: fmt.Sprintf(format, args...)})
		}
		differs := func(reason, what string, is, wins any) {
			conflict(oldest.Name, reason, "%s is %v, but %v in the oldest export, of cluster %s", what, is, wins, oldest.Name)
		}
		if s.Headless != imp.Headless {
			differs(TypeConflict, "headless", s.Headless, imp.Headless)
		}
		if s.Affinity != imp.Affinity {
			differs(SessionAffinityConflict, "session affinity", quote(s.Affinity, "None"), quote(imp.Affinity, "None"))
		} else if s.AffinityTimeout != imp.AffinityTimeout {
			differs(SessionAffinityConfigConflict, "session affinity's timeout",
				cmp.Or(s.AffinityTimeout, discovery.DefaultAffinityTimeout), cmp.Or(imp.AffinityTimeout, discovery.DefaultAffinityTimeout))
		}
		if s.InternalTrafficPolicy != imp.InternalTrafficPolicy {
			differs(InternalTrafficPolicyConflict, "internalTrafficPolicy", quote(s.InternalTrafficPolicy, "Cluster"), quote(imp.InternalTrafficPolicy, "Cluster"))
		}
		if s.TrafficDistribution != imp.TrafficDistribution {
			differs(TrafficDistributionConflict, "trafficDistribution", quote(s.TrafficDistribution, ""), quote(imp.TrafficDistribution, ""))
		}
		if len(s.IPFamilies) > 0 && !slices.ContainsFunc(s.IPFamilies, func(f discovery.IPFamily) bool { return slices.Contains(imp.IPFamilies, f) }) {
			conflict(oldest.Name, IPFamilyConflict, "ipFamilies are %v, none of which is in %v as in the oldest export, of cluster %s", s.IPFamilies, imp.IPFamilies, oldest.Name)
		}
		if !maps.Equal(s.Labels, imp.Labels) {
			conflict(oldest.Name, LabelsConflict, "exported labels differ from those of the oldest export, of cluster %s: %s", oldest.Name, difference(s.Labels, imp.Labels))
		}
		if !maps.Equal(s.Annotations, imp.Annotations) {
			conflict(oldest.Name, AnnotationsConflict, "exported annotations differ from those of the oldest export, of cluster %s: %s", oldest.Name, difference(s.Annotations, imp.Annotations))
		}
		for _, p := range s.Ports {
			if held := clash(imp.Ports, p); held < 0 {
				imp.Ports = append(imp.Ports, p)
				declared = append(declared, s.Name)
			} else if imp.Ports[held] != p {
				conflict(declared[held], PortConflict, "port %s conflicts with %s of an older export, of cluster %s", describe(p), describe(imp.Ports[held]), declared[held])
			}
		}
		imp.From = append(imp.From, discovery.ImportedFrom{
			Member: s.Name, Ports: s.Ports, Exported: s.Exported, Revision: s.Revision, Endpoints: s.Endpoints, Withheld: s.Withheld,
		})
	}
	for _, s := range from {
		for i, p := range imp.Ports { // the union is served, but not by everybody
			if clash(s.Ports, p) < 0 {
				imp.Conflicts = append(imp.Conflicts, discovery.ImportConflict{Member: s.Name, With: declared[i], Reason: PortConflict,
					Message: fmt.Sprintf("has no port %s, which cluster %s exports: calls to it reach only a part of the endpoints", describe(p), declared[i])})
			}
		}
	}
	slices.SortFunc(imp.Ports, func(a, b discovery.Port) int {
		return cmp.Or(cmp.Compare(a.Number, b.Number), cmp.Compare(a.Name, b.Name))
	})
	return imp
}

// families returns the IP families that all exports have, so that each reaches every endpoint; in the oldest export's order. If none is
// common, those of the oldest.
func families(from []share) []discovery.IPFamily {
	var oldest []discovery.IPFamily
	for _, s := range from {
		if oldest = s.IPFamilies; len(oldest) > 0 {
			break
		}
	}
	var common []discovery.IPFamily
	for _, f := range oldest {
		if !slices.ContainsFunc(from, func(s share) bool { return len(s.IPFamilies) > 0 && !slices.Contains(s.IPFamilies, f) }) {
			common = append(common, f)
		}
	}
	if len(common) == 0 {
		return oldest
	}
	return common
}

// quote writes s, or the default that its absence means.
func quote(s, absent string) string { return strconv.Quote(cmp.Or(s, absent)) }

// difference names the first key, in order, in which two maps differ.
func difference(is, wins map[string]string) string {
	for _, k := range slices.Sorted(maps.Keys(is)) {
		if v, ok := wins[k]; !ok {
			return fmt.Sprintf("%s is only here", k)
		} else if v != is[k] {
			return fmt.Sprintf("%s is %.80q, not %.80q", k, is[k], v)
		}
	}
	for _, k := range slices.Sorted(maps.Keys(wins)) {
		if _, ok := is[k]; !ok {
			return fmt.Sprintf("%s is only there", k)
		}
	}
	return "in nothing"
}

// clash returns the index of the port that has p's name, else its number and transport, or -1.
func clash(ports []discovery.Port, p discovery.Port) int {
	if i := slices.IndexFunc(ports, func(q discovery.Port) bool { return q.Name == p.Name }); i >= 0 {
		return i
	}
	return slices.IndexFunc(ports, func(q discovery.Port) bool { return q.Number == p.Number && q.UDP == p.UDP && q.SCTP == p.SCTP })
}

func describe(p discovery.Port) string {
	transport := "TCP"
	switch {
	case p.UDP:
		transport = "UDP"
	case p.SCTP:
		transport = "SCTP"
	}
	return fmt.Sprintf("%q %d/%s (%s)", p.Name, p.Number, transport, p.Protocol)
}

// sameImport compares endpoints by identity: parts share what did not change.
func sameImport(a, b *discovery.Import) bool {
	return a.Traits.Equal(b.Traits) && maps.Equal(a.Labels, b.Labels) && maps.Equal(a.Annotations, b.Annotations) &&
		slices.Equal(a.Ports, b.Ports) && slices.Equal(a.Conflicts, b.Conflicts) &&
		slices.EqualFunc(a.From, b.From, func(x, y discovery.ImportedFrom) bool {
			return x.Member == y.Member && x.Revision == y.Revision && x.Withheld == y.Withheld && x.Exported.Equal(y.Exported) &&
				slices.Equal(x.Ports, y.Ports) && slices.Equal(x.Endpoints, y.Endpoints)
		})
}
