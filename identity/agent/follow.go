package agent

import (
	"context"
	"errors"
	"time"

	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/metadata"

	"github.com/hanse-mesh/hanse/identity/spiretypes"
)

// followServer has the server tell of changes of this agent's entries and bundles, so that they need not wait for the next sync, until ctx ends.
// Without it, and at servers that tell nothing, the syncs go on as ever.
func (a *Agent) followServer(ctx context.Context) error {
	first := max(min(a.cfg.SyncInterval/5, time.Second), 10*time.Millisecond)
	pause, lost := first, 0
	for {
		told, err := a.followOnce(ctx)
		switch {
		case errors.Is(err, errStock):
			pause = 10 * time.Minute
		case told, errors.Is(err, errNotAttested):
			pause, lost = first, 0
		default:
			lost++
		}
		// The next sync may be a minute off, since changes were told: without that it is due, and at once where the server refuses this agent.
		if lost > 1 || reason(err) != types.PermissionDeniedDetails_UNKNOWN {
			a.kick()
		}
		timer := time.NewTimer(jitter(pause))
		pause = min(2*pause, max(a.cfg.SyncInterval, first))
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-timer.C:
			a.log.Debug("changes of entries are followed anew", "after", err)
		}
	}
}

var (
	errNotAttested = errors.New("not attested")
	errStock       = errors.New("the server does not tell of changes")
)

// followOnce returns when there is nothing more to follow, and whether there was: the server told of something.
func (a *Agent) followOnce(ctx context.Context) (told bool, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if err := a.lock(ctx); err != nil {
		return false, err
	}
	c, err := a.client, errNotAttested
	if a.ended { // a client made now would never be closed
		err = context.Canceled
	} else if a.state.agent.valid(a.cfg.Now()) {
		c, err = a.mutual()
	}
	<-a.work
	if err != nil {
		return false, err
	}
	stream, err := c.entries.SyncAuthorizedEntries(metadata.AppendToOutgoingContext(ctx, spiretypes.FollowHeader, "true"))
	if err != nil {
		return false, err
	}
	if err := stream.Send(&entryv1.SyncAuthorizedEntriesRequest{OutputMask: &types.EntryMask{}}); err != nil {
		_, err = stream.Recv() // which has the reason
		return false, err
	}
	defer a.told.Store(false)
	for {
		resp, err := stream.Recv()
		if err != nil {
			return told, err
		}
		if len(resp.Entries)+len(resp.EntryRevisions) > 0 { // ours says only that there is something to ask for
			return true, errStock
		}
		told = true
		a.told.Store(true)
		a.kick()
	}
}

// kick has the agent sync now.
func (a *Agent) kick() {
	select {
	case a.nudge <- struct{}{}:
	default:
	}
}
