package xdsserver

import (
	"cmp"
	"maps"
	"slices"
	"time"

	"github.com/hanse-mesh/hanse/discovery/xdsgen"
)

// trustGrace is how long a new proxy may take to acknowledge trust before it counts as knowing nothing: it has fetched
// bundles a moment ago, since it could connect.
const trustGrace = 5 * time.Second

// ProxyStatus is one connected client.
type ProxyStatus struct {
	Viewer    xdsgen.Viewer
	Role      string // sidecar, gateway, agent or grpc
	UserAgent string
	Version   string // of the program
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

// Proxies lists the connected clients by ID.
func (s *Server) Proxies() []ProxyStatus {
	s.mu.Lock()
	sessions := slices.Collect(maps.Keys(s.sessions))
	s.mu.Unlock()
	out := make([]ProxyStatus, 0, len(sessions))
	for _, ss := range sessions {
		ss.mu.Lock()
		p := ProxyStatus{Viewer: ss.viewer, Role: ss.client.role, UserAgent: ss.client.agent, Version: ss.client.version,
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

// TrustBehind names the connected Hanse proxies that have not acknowledged the trust that was announced last, and says how many have.
func (s *Server) TrustBehind() (behind []string, current int) {
	s.mu.Lock()
	trust, revision := s.trust, s.trustRev
	sessions := slices.Collect(maps.Keys(s.sessions))
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
	return behind, current
}

// TrustRevision is the one that was announced last.
func (s *Server) TrustRevision() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.trustRev
}

// TrustLacking names the connected Hanse proxies that have not loaded a trust domain's bundle with at least that sequence. One that
// has only just connected may take trustGrace.
func (s *Server) TrustLacking(td string, sequence uint64) []string {
	s.mu.Lock()
	announced := s.trust[td]
	sessions := slices.Collect(maps.Keys(s.sessions))
	s.mu.Unlock()
	now := s.now()
	var out []string
	for _, ss := range sessions {
		ss.mu.Lock()
		if ss.client.hanse && (ss.acked != nil || now.Sub(ss.since) > trustGrace) && min(announced, ss.acked[td]) < sequence {
			out = append(out, ss.viewer.ID)
		}
		ss.mu.Unlock()
	}
	slices.Sort(out)
	return out
}

// TrustAcked returns, for each trusted domain, the lowest bundle sequence that all connected Hanse proxies have loaded; the
// announced one where none is connected. gRPC clients and Envoys are not counted: their agent is.
func (s *Server) TrustAcked() map[string]uint64 {
	s.mu.Lock()
	lowest := maps.Clone(s.trust)
	sessions := slices.Collect(maps.Keys(s.sessions))
	s.mu.Unlock()
	now := s.now()
	for _, ss := range sessions {
		ss.mu.Lock()
		acked, counts := ss.acked, ss.client.hanse && (ss.acked != nil || now.Sub(ss.since) > trustGrace)
		ss.mu.Unlock()
		if !counts {
			continue
		}
		for td, seq := range lowest {
			lowest[td] = min(seq, acked[td])
		}
	}
	return lowest
}
