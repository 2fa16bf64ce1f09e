package xdsserver

import (
	"cmp"
	"maps"
	"slices"
	"time"

	"github.com/hanse-mesh/hanse/discovery/xdsgen"
)

// trustGrace is how long a new proxy may take to acknowledge trust before it counts as knowing nothing: until then nothing new is acknowledged.
const trustGrace = 5 * time.Second

// ProxyBack is how long a proxy of before is waited for: its longest pause between two attempts (10 s), the longest that an attempt waits for
// an answer (15 s), and time to load bundles.
const ProxyBack = 30 * time.Second

// ProxyStatus is one connected client.
type ProxyStatus struct {
	Viewer    xdsgen.Viewer
	Role      string // sidecar, gateway, agent or grpc
	UserAgent string
	Version   string // of the program
	Hanse     bool   // one of ours, which acknowledges trust
	Connected time.Time
	Types     []TypeStatus      // in no order that means anything; sorted by type URL
	Trust     map[string]uint64 // acknowledged bundle sequences; nil before the first ACK
}

// TypeStatus is one resource type on one stream.
type TypeStatus struct {
	TypeURL string
	Names   int    // subscribed, or brought by a wildcard
	Sent    string // version of the newest response
	SentAt  time.Time
	Acked   string // version of the newest response that was accepted
	AckedAt time.Time
	NACK    string // why the newest answered response was rejected; "" where it was accepted
	NACKAt  time.Time
}

// streams are all that are open. It is called with mu held.
func (s *Server) streams() []*session {
	return slices.AppendSeq(make([]*session, 0, len(s.sessions)), maps.Keys(s.sessions))
}

// Proxies lists the connected clients by ID.
func (s *Server) Proxies() []ProxyStatus {
	s.mu.Lock()
	sessions := s.streams()
	s.mu.Unlock()
	out := make([]ProxyStatus, 0, len(sessions))
	for _, ss := range sessions {
		ss.mu.Lock()
		p := ProxyStatus{Viewer: ss.viewer, Role: ss.client.role, UserAgent: ss.client.agent, Version: ss.client.version, Hanse: ss.client.hanse,
			Connected: ss.since, Trust: ss.acked}
		for _, typeURL := range slices.Sorted(maps.Keys(ss.status)) {
			p.Types = append(p.Types, *ss.status[typeURL])
		}
		ss.mu.Unlock()
		if p.Viewer.SPIFFEID != "" { // before its first request a client has no name
			out = append(out, p)
		}
	}
	slices.SortFunc(out, func(a, b ProxyStatus) int {
		return cmp.Or(cmp.Compare(a.Viewer.ID, b.Viewer.ID), a.Connected.Compare(b.Connected))
	})
	return out
}

// Expect names proxies that were connected to this control plane before it was started anew, or to a replica that is gone. Until one of them
// is back and has acknowledged, or Moved says where it is, or ProxyBack has passed (from the first view on), it counts as not knowing what is new.
func (s *Server) Expect(ids []string) {
	if len(ids) == 0 {
		return
	}
	var until time.Time // not before anybody can connect
	s.mu.Lock()
	if s.serving {
		until = s.now().Add(ProxyBack)
	}
	for _, id := range ids {
		s.expected[id] = until
	}
	s.comings++
	sessions := s.streams()
	s.mu.Unlock()
	var here []string
	for _, ss := range sessions {
		ss.mu.Lock()
		if ss.acked != nil { // who acknowledges from now on is taken off the list then
			here = append(here, ss.viewer.ID)
		}
		ss.mu.Unlock()
	}
	s.Moved(here)
}

// Moved notes that these proxies are connected, here or to another replica that answers for what they have loaded: they are expected no more.
func (s *Server) Moved(ids []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, id := range ids {
		if _, ok := s.expected[id]; ok {
			delete(s.expected, id)
			s.comings++
		}
	}
}

// serves begins the time of those who are expected.
func (s *Server) serves() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.serving = true
	for id := range s.expected {
		s.expected[id] = s.now().Add(ProxyBack)
	}
}

// absent are those that are expected now, and until when. It is called with mu held.
func (s *Server) absent() map[string]time.Time {
	now := s.now()
	n := len(s.expected)
	maps.DeleteFunc(s.expected, func(_ string, until time.Time) bool { return !until.IsZero() && !now.Before(until) })
	if len(s.expected) < n {
		s.comings++
	}
	return maps.Clone(s.expected)
}

// roster is the last that was made.
type roster struct {
	names []string // nil: none was
	of    uint64   // the Server's comings
}

// Roster names the Hanse proxies that are connected or expected: what is to be handed to Expect after the next start. It is sorted, and must
// not be changed.
func (s *Server) Roster() []string {
	s.mu.Lock()
	ids, of := s.absent(), s.comings
	if r := s.roster; r.names != nil && r.of == of {
		s.mu.Unlock()
		return r.names
	}
	sessions := s.streams()
	s.mu.Unlock()
	for _, ss := range sessions {
		ss.mu.Lock()
		if ss.client.hanse {
			ids[ss.viewer.ID] = time.Time{}
		}
		ss.mu.Unlock()
	}
	names := slices.AppendSeq(make([]string, 0, len(ids)), maps.Keys(ids))
	slices.Sort(names)
	s.mu.Lock()
	s.roster = roster{names, of}
	s.mu.Unlock()
	return names
}

// TrustBehind names the Hanse proxies, connected or expected, that have not acknowledged the trust that was announced last, and says how many have.
func (s *Server) TrustBehind() (behind []string, current int) {
	s.mu.Lock()
	trust, revision := s.trust, s.trustRev
	behind = slices.Collect(maps.Keys(s.absent()))
	sessions := s.streams()
	s.mu.Unlock()
	for _, ss := range sessions {
		ss.mu.Lock()
		switch {
		case !ss.client.hanse:
		case ss.acked != nil && ss.ackedRev == revision && maps.Equal(ss.acked, trust):
			current++
		default:
			behind = append(behind, ss.viewer.ID)
		}
		ss.mu.Unlock()
	}
	slices.Sort(behind)
	return slices.Compact(behind), current
}

// TrustRevision is the one that was announced last.
func (s *Server) TrustRevision() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.trustRev
}

// Lacking is a proxy that has not loaded a bundle.
type Lacking struct {
	ID    string
	Until time.Time // it is not connected, and expected until then; zero: it is connected, or nobody can be yet
}

// TrustLacking names the Hanse proxies that have not loaded a trust domain's bundle with at least that sequence. Those that are expected, or
// have only just connected, have loaded what was acknowledged before.
func (s *Server) TrustLacking(td string, sequence uint64, before map[string]uint64) []Lacking {
	s.mu.Lock()
	announced := s.trust[td]
	lacking := map[string]time.Time{}
	if before[td] < sequence {
		lacking = s.absent()
	}
	sessions := s.streams()
	s.mu.Unlock()
	now := s.now()
	for _, ss := range sessions {
		ss.mu.Lock()
		loaded := ss.acked[td]
		if ss.acked == nil && now.Sub(ss.since) <= trustGrace {
			loaded = before[td]
		}
		if ss.client.hanse && min(announced, loaded) < sequence {
			lacking[ss.viewer.ID] = time.Time{}
		}
		ss.mu.Unlock()
	}
	out := make([]Lacking, 0, len(lacking))
	for _, id := range slices.Sorted(maps.Keys(lacking)) {
		out = append(out, Lacking{id, lacking[id]})
	}
	return out
}

// TrustAcked returns, for each trusted domain, the lowest bundle sequence that all Hanse proxies have loaded; the announced one where there is
// none. It is not above what was acknowledged before while anybody is expected, or has only just connected. gRPC clients and Envoys are not
// counted: their agent is.
func (s *Server) TrustAcked(before map[string]uint64) map[string]uint64 {
	s.mu.Lock()
	lowest, gen, waits := maps.Clone(s.trust), s.trustGen, len(s.absent()) > 0
	sessions := s.streams()
	s.mu.Unlock()
	if lowest == nil { // nothing is announced yet
		return maps.Clone(before)
	}
	now := s.now()
	for _, ss := range sessions {
		ss.mu.Lock()
		acked, ackedGen, hanse := ss.acked, ss.ackedGen, ss.client.hanse
		ss.mu.Unlock()
		switch {
		case !hanse, acked != nil && ackedGen == gen: // all that is announced
		case acked == nil && now.Sub(ss.since) <= trustGrace:
			waits = true
		default:
			for td, seq := range lowest {
				lowest[td] = min(seq, acked[td])
			}
		}
	}
	if waits {
		for td, seq := range lowest {
			lowest[td] = min(seq, before[td])
		}
	}
	return lowest
}
