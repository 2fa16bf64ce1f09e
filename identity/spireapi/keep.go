package spireapi

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

// Keep makes the entries whose IDs begin with prefix exactly those that are wanted, each of which has such an ID. They federate with every
// related trust domain. It returns how many it made, changed and removed; one that it cannot write does not keep it from the others. It writes to
// Config.KeptKV, and stops when ctx ends.
func (s *Server) Keep(ctx context.Context, prefix string, want []*types.Entry) (changed int, err error) {
	wanted := map[string]bool{}
	var errs []error
	for _, p := range want {
		if ctx.Err() != nil {
			return changed, ctx.Err()
		}
		wanted[p.Id] = true
		if !strings.HasPrefix(p.Id, prefix) || !validEntryID(p.Id) || len(p.Selectors) == 0 { // without selectors it would be everybody's
			errs = append(errs, fmt.Errorf("entry %q is not one of those kept as %s…", p.Id, prefix))
			continue
		}
		if cur := s.reg.entry(p.Id); cur != nil && kept(cur, p) {
			continue
		}
		_, err := s.reg.putEntryIn(ctx, s.cfg.KeptKV, p.Id, func(cur *entryRecord) (*entryRecord, error) {
			if cur != nil && kept(cur, p) {
				return cur, nil
			}
			next, err := newEntryRecord(proto.CloneOf(p), true)
			if err != nil {
				return nil, err
			}
			next.FederatesWith, next.CreatedAt, next.RevisionNumber = nil, s.cfg.Now().Unix(), 0
			if cur != nil {
				next.CreatedAt, next.RevisionNumber = cur.CreatedAt, cur.RevisionNumber+1
			}
			changed++
			return next, nil
		})
		errs = append(errs, err)
	}
	for _, e := range s.reg.allEntries() {
		if !strings.HasPrefix(e.Id, prefix) || wanted[e.Id] {
			continue
		}
		if ctx.Err() != nil {
			return changed, ctx.Err()
		}
		gone, err := s.reg.deleteEntryIn(ctx, s.cfg.KeptKV, e.Id)
		if gone {
			changed++
		}
		errs = append(errs, err)
	}
	return changed, errors.Join(errs...)
}

// kept reports whether cur is what is wanted.
func kept(cur *entryRecord, want *types.Entry) bool {
	return cur.federateAll && proto.Equal(cur.SpiffeId, want.SpiffeId) && proto.Equal(cur.ParentId, want.ParentId) && cur.Hint == want.Hint &&
		cur.X509SvidTtl == want.X509SvidTtl && cur.JwtSvidTtl == want.JwtSvidTtl && sameSet(selectorStrings(cur.Selectors), selectorStrings(want.Selectors))
}

// byItself says why a person cannot change an entry, or nil.
func byItself(e *entryRecord) error {
	if !e.federateAll {
		return nil
	}
	return status.Errorf(codes.FailedPrecondition, "entry %q came with an agent's token or pod, or is kept for a discovered workload, and cannot be changed", e.Id)
}
