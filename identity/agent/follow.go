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

// followServer has the server tell of changes of this agent's entries, so that they need not wait for the next sync, until ctx ends.
// Without it, and at servers that tell nothing, the syncs go on as ever.
func (a *Agent) followServer(ctx context.Context) error {
	for {
		err := a.followOnce(ctx)
		pause := min(a.cfg.SyncInterval/5, time.Second)
		if errors.Is(err, errStock) {
			pause = 10 * time.Minute
		}
		timer := time.NewTimer(jitter(max(pause, 10*time.Millisecond)))
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

func (a *Agent) followOnce(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if err := a.lock(ctx); err != nil {
		return err
	}
	c, err := a.client, errNotAttested
	if a.ended { // a client made now would never be closed
		err = context.Canceled
	} else if a.state.agent.valid(a.cfg.Now()) {
		c, err = a.mutual()
	}
	<-a.work
	if err != nil {
		return err
	}
	stream, err := c.entries.SyncAuthorizedEntries(metadata.AppendToOutgoingContext(ctx, spiretypes.FollowHeader, "true"))
	if err != nil {
		return err
	}
	if err := stream.Send(&entryv1.SyncAuthorizedEntriesRequest{OutputMask: &types.EntryMask{}}); err != nil {
		_, err = stream.Recv() // which has the reason
		return err
	}
	for {
		resp, err := stream.Recv()
		if err != nil {
			return err
		}
		if len(resp.Entries)+len(resp.EntryRevisions) > 0 { // ours says only that there is something to ask for
			return errStock
		}
		select {
		case a.nudge <- struct{}{}:
		default:
		}
	}
}
