package spireapi

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/hanse-mesh/hanse/identity"
	"github.com/hanse-mesh/hanse/identity/spiretypes"
)

type entryService struct {
	entryv1.UnimplementedEntryServer
	service
}

// Bounds of an entry.
const (
	maxBatch     = 500
	maxSelectors = 100
	maxNames     = 100  // DNS names, and federated trust domains
	maxString    = 1024 // bytes of a selector, a hint
	maxID        = 255
)

// newEntryRecord checks an entry that is ours already. The caller gives it away.
func newEntryRecord(p *types.Entry, federateAll bool) (*entryRecord, error) {
	e := &entryRecord{Entry: p, federateAll: federateAll}
	var err error
	if e.spiffeID, err = spiretypes.ToID(p.SpiffeId); err != nil {
		return nil, fmt.Errorf("spiffe_id: %w", err)
	}
	if e.parentID, err = spiretypes.ToID(p.ParentId); err != nil {
		return nil, fmt.Errorf("parent_id: %w", err)
	}
	return e, nil
}

// foreignEntry decodes and bounds an entry that came from elsewhere.
func (s *service) foreignEntry(p *types.Entry) (*entryRecord, error) {
	if p == nil {
		return nil, errors.New("missing entry")
	}
	e, err := newEntryRecord(proto.Clone(p).(*types.Entry), false)
	if err != nil {
		return nil, err
	}
	e.SpiffeId, e.ParentId = spiretypes.FromID(e.spiffeID), spiretypes.FromID(e.parentID)
	switch {
	case !e.spiffeID.MemberOf(s.td):
		return nil, fmt.Errorf("spiffe_id: %s is not of trust domain %s", e.spiffeID, s.td)
	case e.spiffeID.Path() == "":
		return nil, fmt.Errorf("spiffe_id: %s names no workload", e.spiffeID)
	case identity.Reserved(e.spiffeID):
		return nil, fmt.Errorf("spiffe_id: %s is reserved", e.spiffeID)
	case !e.parentID.MemberOf(s.td) || e.parentID.Path() == "":
		return nil, fmt.Errorf("parent_id: %s names no agent or workload of %s", e.parentID, s.td)
	case len(e.Selectors) == 0 || len(e.Selectors) > maxSelectors:
		return nil, fmt.Errorf("selectors: %d, want 1 to %d", len(e.Selectors), maxSelectors)
	case len(e.FederatesWith) > maxNames:
		return nil, fmt.Errorf("federates_with: more than %d", maxNames)
	case len(e.DnsNames) > maxNames:
		return nil, fmt.Errorf("dns_names: more than %d", maxNames)
	case e.X509SvidTtl < 0 || e.JwtSvidTtl < 0 || e.ExpiresAt < 0:
		return nil, errors.New("a TTL or expiry is negative")
	case len(e.Hint) > maxString:
		return nil, errors.New("hint: too long")
	}
	for _, sel := range e.Selectors {
		switch {
		case sel.GetType() == "" || strings.Contains(sel.GetType(), ":"):
			return nil, fmt.Errorf("selectors: type %q is empty or has a colon", sel.GetType())
		case sel.GetValue() == "" || len(sel.GetType())+len(sel.GetValue()) > maxString:
			return nil, fmt.Errorf("selectors: %s has an empty or too long value", sel.GetType())
		}
	}
	for i, name := range e.FederatesWith {
		td, err := spiffeid.TrustDomainFromString(name)
		switch {
		case err != nil:
			return nil, fmt.Errorf("federates_with: %q: %w", name, err)
		case td == s.td:
			return nil, fmt.Errorf("federates_with: %s is this trust domain", td)
		}
		e.FederatesWith[i] = td.Name()
	}
	for _, name := range e.DnsNames {
		if !validDNSName(name) {
			return nil, fmt.Errorf("dns_names: %q is not a DNS name", name)
		}
	}
	return e, nil
}

func validDNSName(name string) bool {
	if len(name) > 253 {
		return false
	}
	for i, label := range strings.Split(name, ".") {
		if label == "*" && i == 0 {
			continue
		}
		if label == "" || len(label) > 63 || label[0] == '-' || label[len(label)-1] == '-' {
			return false
		}
		for _, c := range label {
			if (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && c != '-' && c != '_' {
				return false
			}
		}
	}
	return true
}

func validEntryID(id string) bool {
	if id == "" || len(id) > maxID {
		return false
	}
	for _, c := range id {
		if (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && !strings.ContainsRune("-_.", c) {
			return false
		}
	}
	return true
}

// proto returns the entry as callers see it.
func (s *service) entryProto(e *entryRecord, m *types.EntryMask) *types.Entry {
	all := m == nil
	p := &types.Entry{Id: e.Id}
	if all || m.SpiffeId {
		p.SpiffeId = e.SpiffeId
	}
	if all || m.ParentId {
		p.ParentId = e.ParentId
	}
	if all || m.Selectors {
		p.Selectors = e.Selectors
	}
	if all || m.X509SvidTtl {
		p.X509SvidTtl = e.X509SvidTtl
	}
	if all || m.FederatesWith {
		p.FederatesWith = s.federatesWith(e)
	}
	if all || m.Admin {
		p.Admin = e.Admin
	}
	if all || m.Downstream {
		p.Downstream = e.Downstream
	}
	if all || m.ExpiresAt {
		p.ExpiresAt = e.ExpiresAt
	}
	if all || m.DnsNames {
		p.DnsNames = e.DnsNames
	}
	if all || m.RevisionNumber {
		p.RevisionNumber = s.revision(e)
	}
	if all || m.StoreSvid {
		p.StoreSvid = e.StoreSvid
	}
	if all || m.JwtSvidTtl {
		p.JwtSvidTtl = e.JwtSvidTtl
	}
	if all || m.Hint {
		p.Hint = e.Hint
	}
	if all || m.CreatedAt {
		p.CreatedAt = e.CreatedAt
	}
	return p
}

func (s *service) federatesWith(e *entryRecord) []string {
	if !e.federateAll {
		return e.FederatesWith
	}
	var out []string
	for _, r := range s.cfg.Bundles.Relations() {
		out = append(out, r.TrustDomain.Name())
	}
	return out
}

// revision grows with each change that callers see, of the relations too.
func (s *service) revision(e *entryRecord) int64 {
	if e.federateAll {
		return e.RevisionNumber + s.cfg.Bundles.Revision()
	}
	return e.RevisionNumber
}

// CountEntries counts, for administrators.
func (s *entryService) CountEntries(ctx context.Context, req *entryv1.CountEntriesRequest) (*entryv1.CountEntriesResponse, error) {
	if err := s.admin(ctx); err != nil {
		return nil, err
	}
	f := req.GetFilter()
	entries, err := s.filterEntries(&entryv1.ListEntriesRequest_Filter{BySpiffeId: f.GetBySpiffeId(), ByParentId: f.GetByParentId(),
		BySelectors: f.GetBySelectors(), ByFederatesWith: f.GetByFederatesWith(), ByHint: f.GetByHint(), ByDownstream: f.GetByDownstream()})
	if err != nil {
		return nil, err
	}
	return &entryv1.CountEntriesResponse{Count: int32(len(entries))}, nil
}

// ListEntries lists entries page by page, for administrators.
func (s *entryService) ListEntries(ctx context.Context, req *entryv1.ListEntriesRequest) (*entryv1.ListEntriesResponse, error) {
	if err := s.admin(ctx); err != nil {
		return nil, err
	}
	entries, err := s.filterEntries(req.GetFilter())
	if err != nil {
		return nil, err
	}
	page, next := paginate(entries, func(e *entryRecord) string { return e.Id }, req.PageSize, req.PageToken)
	resp := &entryv1.ListEntriesResponse{NextPageToken: next}
	for _, e := range page {
		resp.Entries = append(resp.Entries, s.entryProto(e, req.OutputMask))
	}
	return resp, nil
}

func (s *entryService) filterEntries(f *entryv1.ListEntriesRequest_Filter) ([]*entryRecord, error) {
	var byID, byParent spiffeid.ID
	var err error
	if f.GetBySpiffeId() != nil {
		if byID, err = spiretypes.ToID(f.BySpiffeId); err != nil {
			return nil, invalid("filter: by_spiffe_id: %v", err)
		}
	}
	if f.GetByParentId() != nil {
		if byParent, err = spiretypes.ToID(f.ByParentId); err != nil {
			return nil, invalid("filter: by_parent_id: %v", err)
		}
	}
	var out []*entryRecord
	for _, e := range s.reg.allEntries() {
		switch {
		case !byID.IsZero() && e.spiffeID != byID:
		case !byParent.IsZero() && e.parentID != byParent:
		case f.GetBySelectors() != nil && !matchSet(int32(f.BySelectors.Match), selectorStrings(e.Selectors), selectorStrings(f.BySelectors.Selectors)):
		case f.GetByFederatesWith() != nil && !matchSet(int32(f.ByFederatesWith.Match), s.federatesWith(e), f.ByFederatesWith.TrustDomains):
		case f.GetByHint() != nil && e.Hint != f.ByHint.Value:
		case !admits(f.GetByDownstream(), e.Downstream):
		default:
			out = append(out, e)
		}
	}
	return out, nil
}

// GetEntry returns one entry, for administrators.
func (s *entryService) GetEntry(ctx context.Context, req *entryv1.GetEntryRequest) (*types.Entry, error) {
	if err := s.admin(ctx); err != nil {
		return nil, err
	}
	e := s.reg.entry(req.Id)
	if e == nil {
		return nil, status.Errorf(codes.NotFound, "entry %q not found", req.Id)
	}
	return s.entryProto(e, req.OutputMask), nil
}

// BatchCreateEntry creates entries, for administrators.
func (s *entryService) BatchCreateEntry(ctx context.Context, req *entryv1.BatchCreateEntryRequest) (*entryv1.BatchCreateEntryResponse, error) {
	if err := s.admin(ctx); err != nil {
		return nil, err
	}
	if len(req.Entries) > maxBatch {
		return nil, invalid("more than %d entries", maxBatch)
	}
	resp := new(entryv1.BatchCreateEntryResponse)
	for _, p := range req.Entries {
		e, err := s.createEntry(ctx, p)
		r := &entryv1.BatchCreateEntryResponse_Result{Status: statusOf(err)}
		if e != nil {
			r.Entry = s.entryProto(e, req.OutputMask)
		}
		resp.Results = append(resp.Results, r)
	}
	return resp, nil
}

// createEntry returns the existing entry along with an AlreadyExists error.
func (s *entryService) createEntry(ctx context.Context, p *types.Entry) (*entryRecord, error) {
	e, err := s.foreignEntry(p)
	if err != nil {
		return nil, invalid("%v", err)
	}
	if e.Id == "" {
		e.Id = strings.ToLower(rand.Text())
	}
	if !validEntryID(e.Id) {
		return nil, invalid("id: %q has characters other than letters, digits, '-', '_' and '.', or is too long", e.Id)
	}
	e.RevisionNumber, e.CreatedAt = 0, s.cfg.Now().Unix()
	var existing *entryRecord
	e, err = s.reg.putEntry(ctx, e.Id, func(cur *entryRecord) (*entryRecord, error) {
		if existing = cur; existing == nil {
			existing = s.reg.similar(e)
		}
		if existing != nil {
			return nil, status.Error(codes.AlreadyExists, "entry already exists")
		}
		return e, nil
	})
	switch {
	case existing != nil:
		return existing, err
	case err != nil:
		return nil, s.internal("create entry", err)
	}
	s.log.Info("entry created", "entry", e.Id, "id", e.spiffeID.String())
	return e, nil
}

// BatchUpdateEntry changes the fields of entries that input_mask names, for administrators.
func (s *entryService) BatchUpdateEntry(ctx context.Context, req *entryv1.BatchUpdateEntryRequest) (*entryv1.BatchUpdateEntryResponse, error) {
	if err := s.admin(ctx); err != nil {
		return nil, err
	}
	if len(req.Entries) > maxBatch {
		return nil, invalid("more than %d entries", maxBatch)
	}
	resp := new(entryv1.BatchUpdateEntryResponse)
	for _, p := range req.Entries {
		e, err := s.updateEntry(ctx, p, req.InputMask)
		r := &entryv1.BatchUpdateEntryResponse_Result{Status: statusOf(err)}
		if err == nil {
			r.Entry = s.entryProto(e, req.OutputMask)
		}
		resp.Results = append(resp.Results, r)
	}
	return resp, nil
}

func (s *entryService) updateEntry(ctx context.Context, p *types.Entry, m *types.EntryMask) (*entryRecord, error) {
	if p == nil {
		return nil, invalid("missing entry")
	}
	e, err := s.reg.putEntry(ctx, p.Id, func(cur *entryRecord) (*entryRecord, error) {
		if cur == nil {
			return nil, status.Errorf(codes.NotFound, "entry %q not found", p.Id)
		}
		if err := byItself(cur); err != nil {
			return nil, err
		}
		next, err := s.foreignEntry(mergeEntry(cur.Entry, p, m))
		if err != nil {
			return nil, invalid("%v", err)
		}
		next.RevisionNumber, next.CreatedAt = cur.RevisionNumber+1, cur.CreatedAt
		return next, nil
	})
	if err != nil {
		if _, ok := status.FromError(err); ok {
			return nil, err
		}
		return nil, s.internal("update entry", err)
	}
	s.log.Info("entry updated", "entry", e.Id, "id", e.spiffeID.String())
	return e, nil
}

// mergeEntry returns cur with the fields of p that m names, all of them if m is nil.
func mergeEntry(cur, p *types.Entry, m *types.EntryMask) *types.Entry {
	all := m == nil
	n := proto.Clone(cur).(*types.Entry)
	if all || m.SpiffeId {
		n.SpiffeId = p.SpiffeId
	}
	if all || m.ParentId {
		n.ParentId = p.ParentId
	}
	if all || m.Selectors {
		n.Selectors = p.Selectors
	}
	if all || m.X509SvidTtl {
		n.X509SvidTtl = p.X509SvidTtl
	}
	if all || m.FederatesWith {
		n.FederatesWith = p.FederatesWith
	}
	if all || m.Admin {
		n.Admin = p.Admin
	}
	if all || m.Downstream {
		n.Downstream = p.Downstream
	}
	if all || m.ExpiresAt {
		n.ExpiresAt = p.ExpiresAt
	}
	if all || m.DnsNames {
		n.DnsNames = p.DnsNames
	}
	if all || m.StoreSvid {
		n.StoreSvid = p.StoreSvid
	}
	if all || m.JwtSvidTtl {
		n.JwtSvidTtl = p.JwtSvidTtl
	}
	if all || m.Hint {
		n.Hint = p.Hint
	}
	return n
}

// BatchDeleteEntry deletes entries, for administrators.
func (s *entryService) BatchDeleteEntry(ctx context.Context, req *entryv1.BatchDeleteEntryRequest) (*entryv1.BatchDeleteEntryResponse, error) {
	if err := s.admin(ctx); err != nil {
		return nil, err
	}
	if len(req.Ids) > maxBatch {
		return nil, invalid("more than %d entries", maxBatch)
	}
	resp := new(entryv1.BatchDeleteEntryResponse)
	for _, id := range req.Ids {
		ok, err := s.reg.deleteEntry(ctx, id)
		switch {
		case err != nil:
			err = s.internal("delete entry", err)
		case !ok:
			err = status.Errorf(codes.NotFound, "entry %q not found", id)
		default:
			s.log.Info("entry deleted", "entry", id)
		}
		resp.Results = append(resp.Results, &entryv1.BatchDeleteEntryResponse_Result{Status: statusOf(err), Id: id})
	}
	return resp, nil
}

// GetAuthorizedEntries returns what the calling agent may have SVIDs of.
func (s *entryService) GetAuthorizedEntries(ctx context.Context, req *entryv1.GetAuthorizedEntriesRequest) (*entryv1.GetAuthorizedEntriesResponse, error) {
	a, err := s.agent(ctx)
	if err != nil {
		return nil, err
	}
	resp := new(entryv1.GetAuthorizedEntriesResponse)
	for _, e := range s.reg.authorized(a, s.cfg.Now()) {
		resp.Entries = append(resp.Entries, s.entryProto(e, req.OutputMask))
	}
	return resp, nil
}

// SyncAuthorizedEntries sends the calling agent its entries: all of them if they fit on a page, else their revisions, and
// then those that it asks for.
func (s *entryService) SyncAuthorizedEntries(stream entryv1.Entry_SyncAuthorizedEntriesServer) error {
	ctx := stream.Context()
	a, err := s.agent(ctx)
	if err != nil {
		return err
	}
	req, err := stream.Recv()
	if err != nil {
		return err
	}
	if len(req.Ids) > 0 {
		return invalid("specifying IDs on initial request is not supported")
	}
	if following(ctx) {
		return s.follow(stream, a.ID)
	}
	mask := req.OutputMask
	entries := s.reg.authorized(a, s.cfg.Now())
	if len(entries) <= pageSize {
		return s.sendEntries(stream, entries, mask)
	}
	byID := map[string]*entryRecord{}
	resp := new(entryv1.SyncAuthorizedEntriesResponse)
	for i, e := range entries {
		byID[e.Id] = e
		resp.EntryRevisions = append(resp.EntryRevisions, &entryv1.EntryRevision{Id: e.Id, RevisionNumber: s.revision(e), CreatedAt: e.CreatedAt})
		if last := i == len(entries)-1; last || len(resp.EntryRevisions) == pageSize {
			resp.More = !last
			if err := stream.Send(resp); err != nil {
				return err
			}
			resp = new(entryv1.SyncAuthorizedEntriesResponse)
		}
	}
	for {
		req, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if req.OutputMask != nil {
			return invalid("output mask must be nil on subsequent requests")
		}
		var wanted []*entryRecord
		for _, id := range req.Ids {
			if e := byID[id]; e != nil {
				wanted = append(wanted, e)
			}
		}
		if err := s.sendEntries(stream, wanted, mask); err != nil {
			return err
		}
	}
}

// sendEntries sends at least one response.
func (s *entryService) sendEntries(stream entryv1.Entry_SyncAuthorizedEntriesServer, entries []*entryRecord, mask *types.EntryMask) error {
	for {
		page := entries[:min(len(entries), pageSize)]
		entries = entries[len(page):]
		resp := &entryv1.SyncAuthorizedEntriesResponse{More: len(entries) > 0}
		for _, e := range page {
			resp.Entries = append(resp.Entries, s.entryProto(e, mask))
		}
		if err := stream.Send(resp); err != nil {
			return err
		}
		if !resp.More {
			return nil
		}
	}
}
