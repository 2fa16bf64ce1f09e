package federation

import (
	"cmp"
	"fmt"
	"slices"

	"github.com/hanse-mesh/hanse/discovery"
)

// Conflict reasons of the MCS API (ServiceExport condition Conflict).
const (
	PortConflict            = "PortConflict"
	TypeConflict            = "TypeConflict"
	SessionAffinityConflict = "SessionAffinityConflict"
)

// Source is one cluster's share of a Merge.
type Source struct {
	ID   string // member ID
	Name string
	Part *Part
}

// LocalPart returns a cluster's own exports as a Part, with the export times that Encode has kept.
func LocalPart(s *discovery.Snapshot, e *Exports) *Part {
	p := &Part{Exports: map[discovery.Name]*Export{}}
	for name, svc := range s.Services {
		if svc.Export == nil {
			continue
		}
		since := e.Since(name)
		if since.IsZero() {
			since = Stamp(svc.Export.Created)
		}
		p.Exports[name] = &Export{
			Ports: svc.Ports, Headless: svc.Headless, Affinity: affinity(svc.Affinity), Exported: since, Endpoints: svc.Endpoints,
		}
		p.Endpoints += len(svc.Endpoints)
	}
	return p
}

// Merge makes one Import of all exports of the same name (KEP-1645 "Constraints and conflict resolution"): the union of ports, and where
// exports disagree, the oldest wins; of equally old ones, the smaller member ID. The order of sources does not matter.
// prev (may be nil) is the result before; an Import to which nothing changed is reused.
func Merge(sources []Source, prev map[discovery.Name]*discovery.Import) map[discovery.Name]*discovery.Import {
	type share struct {
		Source
		*Export
	}
	shares := map[discovery.Name][]share{}
	for _, s := range sources {
		for name, e := range s.Part.Exports {
			shares[name] = append(shares[name], share{s, e})
		}
	}
	imports := make(map[discovery.Name]*discovery.Import, len(shares))
	for name, from := range shares {
		slices.SortFunc(from, func(a, b share) int {
			return cmp.Or(a.Exported.Compare(b.Exported), cmp.Compare(a.ID, b.ID))
		})
		imp := &discovery.Import{Name: name, Headless: from[0].Headless, Affinity: from[0].Affinity}
		oldest := from[0].Name
		for _, s := range from {
			conflict := func(reason, format string, args ...any) {
				imp.Conflicts = append(imp.Conflicts, discovery.ImportConflict{Member: s.Name, Reason: reason, Message: fmt.Sprintf(format, args...)})
			}
			if s.Headless != imp.Headless {
				conflict(TypeConflict, "headless is %t, but %t in the oldest export, of cluster %s", s.Headless, imp.Headless, oldest)
			}
			if s.Affinity != imp.Affinity {
				conflict(SessionAffinityConflict, "session affinity is %q, but %q in the oldest export, of cluster %s", s.Affinity, imp.Affinity, oldest)
			}
			for _, p := range s.Ports {
				if held := clash(imp.Ports, p); held == nil {
					imp.Ports = append(imp.Ports, p)
				} else if *held != p {
					conflict(PortConflict, "port %s conflicts with %s of an older export", describe(p), describe(*held))
				}
			}
			imp.From = append(imp.From, discovery.ImportedFrom{
				Member: s.Name, Ports: s.Ports, Exported: s.Exported, Revision: s.Revision, Endpoints: s.Endpoints,
			})
		}
		slices.SortFunc(imp.Ports, func(a, b discovery.Port) int {
			return cmp.Or(cmp.Compare(a.Number, b.Number), cmp.Compare(a.Name, b.Name))
		})
		if old := prev[name]; old != nil && sameImport(old, imp) {
			imp = old
		}
		imports[name] = imp
	}
	return imports
}

// clash returns the port that has p's name or number, or nil.
func clash(ports []discovery.Port, p discovery.Port) *discovery.Port {
	for i := range ports {
		if q := &ports[i]; q.Name == p.Name || q.Number == p.Number && q.UDP == p.UDP {
			return q
		}
	}
	return nil
}

func describe(p discovery.Port) string {
	transport := "TCP"
	if p.UDP {
		transport = "UDP"
	}
	return fmt.Sprintf("%q %d/%s (%s)", p.Name, p.Number, transport, p.Protocol)
}

// sameImport compares endpoints by identity: parts share what did not change.
func sameImport(a, b *discovery.Import) bool {
	return a.Headless == b.Headless && a.Affinity == b.Affinity &&
		slices.Equal(a.Ports, b.Ports) && slices.Equal(a.Conflicts, b.Conflicts) &&
		slices.EqualFunc(a.From, b.From, func(x, y discovery.ImportedFrom) bool {
			return x.Member == y.Member && x.Revision == y.Revision && x.Exported.Equal(y.Exported) &&
				slices.Equal(x.Ports, y.Ports) && slices.Equal(x.Endpoints, y.Endpoints)
		})
}
