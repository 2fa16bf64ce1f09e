package spireapi

import (
	"context"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/hanse-mesh/hanse/identity/spiretypes"
)

// followPause is how long changes are gathered before an agent hears of them.
const followPause = 50 * time.Millisecond

// following reports whether the caller wants to be told of changes, as our agents do.
func following(ctx context.Context) bool {
	md, _ := metadata.FromIncomingContext(ctx)
	return slices.Equal(md.Get(spiretypes.FollowHeader), []string{"true"})
}

// follower is a stream on which an agent is told of changes.
type follower struct {
	*watcher
	since  time.Time
	cancel context.CancelFunc
}

// Of a new bundle agents hear over a time that grows with their number, so that they do not all come at once.
const (
	bundlePoll   = 2 * time.Second // how often other replicas' roots are looked for
	bundleSpread = 3 * time.Second // at most
	bundleRate   = 2000            // a second hear of it
)

// tellOfBundles wakes the followers when a bundle has changed, until ctx ends.
func (s *Server) tellOfBundles(ctx context.Context) {
	tick := time.NewTicker(bundlePoll)
	defer tick.Stop()
	type version struct {
		own     uint64
		foreign int64
	}
	var last version
	for {
		roots, foreign := s.cfg.Authority.Changed(), s.cfg.Bundles.Changed() // before looking
		own, _ := s.cfg.OwnBundle().SequenceNumber()
		now := version{own, s.cfg.Bundles.Revision()}
		if now != last {
			last = now
			s.mu.Lock()
			spread := min(time.Duration(len(s.followed))*time.Second/bundleRate, bundleSpread)
			for _, f := range s.followed {
				time.AfterFunc(rand.N(spread+1), f.signal)
			}
			s.mu.Unlock()
		}
		select {
		case <-ctx.Done():
			return
		case <-roots:
		case <-foreign:
		case <-tick.C:
		}
	}
}

// sequences are those of the bundles that the entries' workloads get, the own one first.
func (s *entryService) sequences(entries []*entryRecord) []uint64 {
	own, _ := s.cfg.OwnBundle().SequenceNumber()
	out := []uint64{own}
	have := s.cfg.Bundles.Sequences()
	for _, e := range entries {
		for _, name := range s.federatesWith(e) {
			if td, err := spiffeid.TrustDomainFromString(name); err == nil {
				out = append(out, have[td])
			}
		}
	}
	return out
}

// Followers names the agents that follow their changes here and began to within the time: what other replicas are to hear by Moved.
func (s *Server) Followers(within time.Duration) []string {
	now := s.cfg.Now()
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []string
	for id, f := range s.followed {
		if now.Sub(f.since) <= within {
			out = append(out, id)
		}
	}
	return out
}

// Moved notes that these agents follow their changes at another replica, which answers for what they have loaded: those that do not do so
// here are waited for here no more.
func (s *Server) Moved(ids []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, id := range ids {
		if s.followed[id] == nil {
			act := s.seen[id]
			act.at = time.Time{}
			s.seen[id] = act
		}
	}
}

// follow sends an agent an empty response now and whenever its entries, or bundles that they need, have changed: it then asks for them as
// ever. An agent has one such stream, its newest.
func (s *entryService) follow(stream entryv1.Entry_SyncAuthorizedEntriesServer, id string) error {
	ctx, cancel := context.WithCancel(stream.Context())
	s.mu.Lock()
	if older := s.followed[id]; older != nil {
		older.cancel()
	}
	w := newWatcher()
	self := &follower{w, s.cfg.Now(), cancel}
	s.followed[id] = self
	s.mu.Unlock()
	defer func() {
		cancel()
		s.reg.watch(w, nil)
		s.mu.Lock()
		if s.followed[id] == self {
			delete(s.followed, id)
		}
		s.mu.Unlock()
	}()
	type version struct {
		id       string
		revision int64
	}
	var last []version
	var lastBundles []uint64
	for first := true; ; first = false {
		a, err := s.agent(stream.Context()) // banned, or expired, meanwhile?
		if err != nil {
			return err
		}
		entries, parents := s.reg.reach(a, s.cfg.Now())
		s.reg.watch(w, parents)
		if again, _ := s.reg.reach(a, s.cfg.Now()); !slices.Equal(entries, again) { // changed before it was watched
			w.signal()
		}
		var now []version
		for _, e := range entries {
			now = append(now, version{e.Id, s.revision(e)})
		}
		bundles := s.sequences(entries)
		if first || !slices.Equal(now, last) || !slices.Equal(bundles, lastBundles) {
			if err := stream.Send(&entryv1.SyncAuthorizedEntriesResponse{}); err != nil {
				return err
			}
			last, lastBundles = now, bundles
		}
		select {
		case <-ctx.Done():
			return status.Error(codes.Aborted, "this agent follows its entries on another stream, or is gone")
		case <-w.wake:
		}
		timer := time.NewTimer(followPause)
		select {
		case <-ctx.Done():
		case <-timer.C:
		}
		timer.Stop()
	}
}
