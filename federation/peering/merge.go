package peering

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"github.com/hanse-mesh/hanse/discovery"
	"github.com/hanse-mesh/hanse/federation"
	"github.com/hanse-mesh/hanse/federation/etcd"
)

// mergeInput is what a Clusterset was made of.
type mergeInput struct {
	local   *discovery.Snapshot
	exports *federation.Exports
	members []memberInput   // sorted by ID
	bundles <-chan struct{} // of the Source; another one after each change
	own     *federation.Part
	result  *federation.Merged
}

type memberInput struct {
	id     string
	entry  *federation.Entry
	part   *federation.Part
	judged judgement
}

// mergeShare bounds the share of time that merging takes while changes keep coming: it rests for so many times as long as it took.
const mergeShare = 4

// merge publishes a new Clusterset if anything that it is made of has changed.
func (m *Mesh) merge() {
	in := mergeInput{local: m.local.Load(), exports: m.exports.Load(), bundles: m.cfg.Source.Changed()}
	b := m.book.Load()
	peers := m.currentPeers()
	for _, member := range b.Members() {
		if p := peers[member.Record.ID]; p != nil {
			in.members = append(in.members, memberInput{member.Record.ID, member, p.part.Load(), *p.judged.Load()})
		}
	}
	last := m.merged
	if in.local == last.local && in.exports == last.exports && in.bundles == last.bundles && last.members != nil &&
		slices.Equal(in.members, last.members) {
		m.mergeLater = false
		return
	}
	start := m.cfg.Now()
	if m.mergeLater = start.Before(m.mergeAt); m.mergeLater {
		return
	}
	if in.local == last.local && in.exports == last.exports {
		in.own = last.own
	} else if in.local != nil {
		in.own = federation.LocalPart(in.local, in.exports, last.own)
	}
	if in.members == nil {
		in.members = []memberInput{} // merged once
	}
	prev := m.clusterset.Load()
	next := &discovery.Clusterset{
		Local: in.local, Members: map[string]*discovery.Member{}, Trusted: map[string]uint64{}, Revision: prev.Revision + 1,
	}
	if next.Local == nil {
		next.Local = prev.Local
	}
	var sources []federation.Source
	if in.own != nil {
		sources = append(sources, federation.Source{ID: b.Self, Name: m.cfg.Self.Cluster, Part: in.own})
	}
	for _, mi := range in.members {
		r := &mi.entry.Record
		next.Members[r.Name] = member(r, mi.judged)
		sources = append(sources, federation.Source{ID: mi.id, Name: r.Name, Part: mi.part})
	}
	for td, b := range m.cfg.Source.Bundles() {
		next.Trusted[td.Name()], _ = b.SequenceNumber()
	}
	in.result = federation.Merge(sources, last.result)
	m.merged, next.Imports = in, in.result.Imports
	m.clusterset.Store(&published{next, make(chan struct{})})
	close(prev.replaced)
	end := m.cfg.Now()
	m.mergeAt = end.Add(mergeShare * end.Sub(start))
}

func member(r *federation.Record, j judgement) *discovery.Member {
	return &discovery.Member{
		ID: r.ID, Name: r.Name, TrustDomain: r.TrustDomain, Network: r.Network, Region: r.Region,
		Addresses: r.Addresses, Gateways: r.Gateways, State: j.state, Since: j.since,
	}
}

// Status is what a person is shown of the mesh.
type Status struct {
	Mesh    string
	Self    federation.Record
	Members []MemberStatus // all but this cluster, sorted by name
	Alarms  []string
	Faults  []federation.Fault // of own exports
	Exports int
	Local   int // endpoints exported
}

// MemberStatus is one other cluster. State is fresh, suspect, withdrawn, joining, left, held (waits for AcceptHeld), disabled, or
// proposed (someone says that it left).
type MemberStatus struct {
	Record    federation.Record
	State     string
	Since     time.Time
	Mirror    etcd.MirrorStatus
	SeenAge   time.Duration // since its last answer; negative if none since the start
	Exports   int
	Endpoints int
	Probe     ProbeResult
	Faults    []federation.Fault
	Acked     uint64 // sequence of this cluster's bundle that it has loaded
	Note      string
}

// Lag is how many revisions the mirror is behind; ok is false if that is not known.
func (s *MemberStatus) Lag() (revisions int64, ok bool) {
	if s.Mirror.LastAnswer.IsZero() || s.State != string(discovery.Fresh) {
		return 0, false
	}
	return s.Mirror.LagRevisions, true
}

// Status returns what is known now.
func (m *Mesh) Status() Status {
	b := m.book.Load()
	if b == nil { // not loaded yet
		return Status{Mesh: m.cfg.MeshName, Self: federation.Record{Name: m.cfg.Self.Cluster, TrustDomain: m.cfg.Self.TrustDomain}}
	}
	s := Status{Mesh: b.Own().Mesh, Self: *b.Own(), Alarms: b.Alarms()}
	if e := m.exports.Load(); e != nil {
		s.Exports, s.Local = e.Services, e.Endpoints
	}
	if f := m.faults.Load(); f != nil {
		s.Faults = *f
	}
	scopes, err := m.exporting()
	for scope, st := range scopes {
		if st.Held != "" {
			s.Alarms = append(s.Alarms, fmt.Sprintf("export of scope %s is held back: %s; if that is right: hanse clusters accept %s", scope, st.Held, s.Self.Name))
		}
	}
	if err != nil {
		s.Alarms = append(s.Alarms, fmt.Sprintf("exports are not written, peers keep what they have: %v", err))
	}
	slices.Sort(s.Alarms)
	now := m.cfg.Now()
	peers := m.currentPeers()
	for id, e := range b.Entries {
		if id == b.Self {
			continue
		}
		ms := MemberStatus{Record: e.Record, State: string(e.Record.Standing), Since: e.Record.Changed, SeenAge: -1}
		if p := peers[id]; p != nil {
			m.peerStatus(&ms, p, now)
		}
		switch {
		case e.Held:
			ms.State, ms.Note = "held", "introduced by "+b.Name(e.Via)+"; waits for: hanse clusters accept "+e.Record.Name
		case e.Proposed != nil:
			ms.State = "proposed"
			ms.Note = b.Name(e.Via) + " says that it has left; if so: hanse clusters accept " + e.Record.Name
		case m.disabled(e.Record.Name) && e.Live():
			ms.State, ms.Note = "disabled", "by its Peer object"
		}
		s.Members = append(s.Members, ms)
	}
	slices.SortFunc(s.Members, func(a, b MemberStatus) int {
		return cmp.Or(cmp.Compare(a.Record.Name, b.Record.Name), cmp.Compare(a.Record.ID, b.Record.ID))
	})
	return s
}

// exporting is the state of the exported scopes, of which a follower knows nothing.
func (m *Mesh) exporting() (map[string]etcd.ScopeStatus, error) {
	if e := m.term.Load().exporter; e != nil {
		return e.Status()
	}
	return nil, nil
}

func (m *Mesh) peerStatus(ms *MemberStatus, p *peer, now time.Time) {
	j, part := p.judged.Load(), p.part.Load()
	ms.State, ms.Since = string(j.state), j.since
	ms.Mirror = p.mirror.Status()
	if !ms.Mirror.LastAnswer.IsZero() {
		ms.SeenAge = now.Sub(ms.Mirror.LastAnswer)
	}
	ms.Exports, ms.Endpoints = part.Exports.Len(), part.Endpoints
	ms.Faults = part.Faults
	if seen := p.seen.Load(); seen != nil {
		ms.Faults = append(slices.Clone(ms.Faults), seen.faults...)
		ms.Acked = seen.acks[m.td.Name()]
	}
	p.mu.Lock()
	ms.Probe = p.probe
	p.mu.Unlock()
	if j.state == discovery.Suspect {
		ms.Note = "control plane silent; its endpoints stay in use, ranked behind others"
		if ms.Probe.OK {
			ms.Note += " (data path answers)"
		}
	}
}
