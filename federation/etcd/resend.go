package etcd

import (
	"bytes"
	"context"
	"errors"
	"slices"
	"strings"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

const (
	// resendFor is how long a Txn that is refused at once is sent again for: longer than etcd takes to elect another of its members when one has died.
	resendFor = 4 * time.Second
	// resendAfter is how long an answer is first waited for, twice that the next time: a member that passes a write on to a leader that is dead waits 7 s for it.
	resendAfter = 2 * time.Second
)

// resending sends a Txn again whose answer was lost with the member of an external etcd that it was sent to, or with the leader there. The stock
// client does so with reads only, since it does not know whether a write was done. Here the next answer says so: what a Txn writes are whole values
// of keys, so to do it twice is to do it once; and if it is refused because its keys are not as they were, it is looked whether they are as it was to
// make them.
type resending struct{ Store }

func (r resending) Txn(ctx context.Context, compares []Compare, ops []Op) (bool, Header, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	began, pause, patience := time.Now(), 50*time.Millisecond, resendAfter
	for first := true; ; first = false {
		ok, h, err := r.attempt(ctx, patience, compares, ops)
		if err == nil && !ok && !first {
			if ok, h, err = r.done(ctx, ops, h); status.Code(err) != codes.Unavailable {
				return ok, h, err
			}
		}
		switch refused := status.Code(err) == codes.Unavailable; {
		case err == nil, ctx.Err() != nil, !refused && !errors.Is(err, context.DeadlineExceeded), refused && time.Since(began) > resendFor:
			return ok, h, err
		case refused && !sleep(ctx, pause):
			return ok, h, err
		case refused:
			pause = min(2*pause, 500*time.Millisecond)
		default:
			patience *= 2
		}
	}
}

// Get reads again where the answer is that etcd has another leader now: it is there, and the stock client would ask it again.
func (r resending) Get(ctx context.Context, key string, revision int64) (*KeyValue, Header, error) {
	for began := time.Now(); ; {
		kv, h, err := r.Store.Get(ctx, key, revision)
		if !leaderChanged(err) || time.Since(began) > resendFor || !sleep(ctx, 50*time.Millisecond) {
			return kv, h, err
		}
	}
}

func leaderChanged(err error) bool {
	s, ok := status.FromError(err)
	return err != nil && ok && s.Code() == codes.Unavailable &&
		slices.ContainsFunc([]error{rpctypes.ErrGRPCLeaderChanged, rpctypes.ErrGRPCTimeoutDueToLeaderFail}, func(x error) bool {
			return strings.Contains(s.Message(), status.Convert(x).Message())
		})
}

func (r resending) attempt(ctx context.Context, patience time.Duration, compares []Compare, ops []Op) (bool, Header, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	return r.Store.Txn(ctx, compares, ops)
}

// done reports whether the keys are as ops make them, in one Txn, and at which revision that was.
func (r resending) done(ctx context.Context, ops []Op, at Header) (bool, Header, error) {
	var revision int64
	for _, op := range ops {
		kv, _, err := r.Get(ctx, op.Key, at.Revision)
		switch {
		case err != nil:
			return false, at, err
		case op.Delete && kv == nil:
			continue
		case op.Delete || kv == nil || !bytes.Equal(kv.Value, op.Value) || revision != 0 && kv.ModRevision != revision:
			return false, at, nil
		}
		revision = kv.ModRevision
	}
	if revision != 0 {
		at.Revision = revision
	}
	return len(ops) > 0, at, nil
}
