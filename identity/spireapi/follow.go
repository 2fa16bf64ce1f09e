package spireapi

import (
	"context"
	"slices"
	"time"

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

// follow sends an agent an empty response now and whenever its entries have changed: it then asks for them as ever. An agent has one such
// stream, its newest.
func (s *entryService) follow(stream entryv1.Entry_SyncAuthorizedEntriesServer, id string) error {
	ctx, cancel := context.WithCancel(stream.Context())
	s.mu.Lock()
	if older := s.followed[id]; older != nil {
		(*older)()
	}
	s.followed[id] = &cancel
	s.mu.Unlock()
	w := newWatcher()
	defer func() {
		cancel()
		s.reg.watch(w, nil)
		s.mu.Lock()
		if s.followed[id] == &cancel {
			delete(s.followed, id)
		}
		s.mu.Unlock()
	}()
	type version struct {
		id       string
		revision int64
	}
	var last []version
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
		if first || !slices.Equal(now, last) {
			if err := stream.Send(&entryv1.SyncAuthorizedEntriesResponse{}); err != nil {
				return err
			}
			last = now
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
