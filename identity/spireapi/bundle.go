package spireapi

import (
	"context"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"maps"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/hanse-mesh/hanse/identity/bundle"
	"github.com/hanse-mesh/hanse/identity/ca"
	"github.com/hanse-mesh/hanse/identity/spiretypes"
)

// bundleService serves bundles. What AppendBundle and PublishJWTAuthority bring is kept beside this replica's own roots and
// published with them, so that replicas never write one another's. WIT-SVIDs are not issued here, so neither is their key
// published.
type bundleService struct {
	bundlev1.UnimplementedBundleServer
	service
}

// CountBundles counts the own and the federated bundles, for administrators.
func (s *bundleService) CountBundles(ctx context.Context, _ *bundlev1.CountBundlesRequest) (*bundlev1.CountBundlesResponse, error) {
	if err := s.admin(ctx); err != nil {
		return nil, err
	}
	return &bundlev1.CountBundlesResponse{Count: int32(1 + len(s.federated()))}, nil
}

// GetBundle returns the bundle of this trust domain to anyone.
func (s *bundleService) GetBundle(ctx context.Context, req *bundlev1.GetBundleRequest) (*types.Bundle, error) {
	own := s.cfg.OwnBundle()
	seq, _ := own.SequenceNumber()
	s.noteLoaded(ctx, s.td, seq)
	return s.bundleProto(own, req.OutputMask)
}

// GetFederatedBundle returns another trust domain's bundle, to administrators and agents.
func (s *bundleService) GetFederatedBundle(ctx context.Context, req *bundlev1.GetFederatedBundleRequest) (*types.Bundle, error) {
	if _, err := s.agent(ctx); err != nil {
		if s.admin(ctx) != nil {
			return nil, err
		}
	}
	td, err := s.foreignTD(req.TrustDomain)
	if err != nil {
		return nil, err
	}
	b, ok := s.cfg.Bundles.Get(td)
	if !ok {
		return nil, status.Errorf(codes.NotFound, "bundle of %s not found", td)
	}
	seq, _ := b.SequenceNumber()
	s.noteLoaded(ctx, td, seq)
	return s.bundleProto(b, req.OutputMask)
}

// AppendBundle adds authorities to this trust domain's bundle, for administrators.
func (s *bundleService) AppendBundle(ctx context.Context, req *bundlev1.AppendBundleRequest) (*types.Bundle, error) {
	if err := s.admin(ctx); err != nil {
		return nil, err
	}
	switch n := len(req.X509Authorities) + len(req.JwtAuthorities); {
	case n == 0:
		return nil, invalid("no authorities to append")
	case n > maxBatch:
		return nil, invalid("more than %d in one batch", maxBatch)
	}
	var all []ca.Added
	for _, a := range req.X509Authorities {
		certs, err := x509.ParseCertificates(a.GetAsn1())
		if err != nil || len(certs) == 0 {
			return nil, invalid("X.509 authority: %v", errors.Join(err, errors.New("want DER certificates")))
		}
		for _, c := range certs {
			all = append(all, ca.Added{Certificate: c, Expires: c.NotAfter, Tainted: a.Tainted})
		}
	}
	for _, k := range req.JwtAuthorities {
		d, err := addedJWT(k)
		if err != nil {
			return nil, err
		}
		all = append(all, d)
	}
	if err := s.add(all...); err != nil {
		return nil, err
	}
	return s.bundleProto(s.cfg.OwnBundle(), req.OutputMask)
}

// PublishJWTAuthority adds a downstream server's JWT key to the bundle, and returns all JWT keys.
func (s *bundleService) PublishJWTAuthority(ctx context.Context, req *bundlev1.PublishJWTAuthorityRequest) (*bundlev1.PublishJWTAuthorityResponse, error) {
	if _, err := s.downstream(ctx); err != nil {
		return nil, err
	}
	if req.JwtAuthority == nil {
		return nil, invalid("missing JWT authority")
	}
	d, err := addedJWT(req.JwtAuthority)
	if err != nil {
		return nil, err
	}
	if d.Expires.IsZero() {
		return nil, invalid("JWT authority %q does not expire: a downstream key must", d.JWTKeyID)
	}
	if err := s.add(d); err != nil {
		return nil, err
	}
	b, err := s.bundleProto(s.cfg.OwnBundle(), &types.BundleMask{JwtAuthorities: true})
	if err != nil {
		return nil, err
	}
	return &bundlev1.PublishJWTAuthorityResponse{JwtAuthorities: b.JwtAuthorities}, nil
}

func addedJWT(k *types.JWTKey) (ca.Added, error) {
	key, err := x509.ParsePKIXPublicKey(k.GetPublicKey())
	if err != nil {
		return ca.Added{}, invalid("JWT authority %q: %v", k.GetKeyId(), err)
	}
	d := ca.Added{JWTKeyID: k.KeyId, JWTKey: key, Tainted: k.Tainted}
	if len(k.KeyId) > maxString {
		return d, invalid("the key ID of a JWT authority is too long")
	}
	if k.ExpiresAt != 0 {
		d.Expires = time.Unix(k.ExpiresAt, 0)
	}
	return d, nil
}

func (s *service) add(all ...ca.Added) error {
	for _, d := range all {
		if !d.Expires.IsZero() && !s.cfg.Now().Before(d.Expires) {
			return invalid("authority %q has expired", d.KeyID())
		}
	}
	err := s.cfg.Authority.Add(all...)
	switch {
	case errors.Is(err, ca.ErrTooMany):
		return status.Errorf(codes.ResourceExhausted, "%v", err)
	case errors.Is(err, ca.ErrAdded):
		return invalid("%v", err)
	case err != nil:
		return s.internal("add authority", err)
	}
	return nil
}

func (s *service) foreignTD(name string) (spiffeid.TrustDomain, error) {
	td, err := spiffeid.TrustDomainFromString(name)
	if err != nil {
		return td, invalid("trust domain %q: %v", name, err)
	}
	if td == s.td {
		return td, invalid("%s is this trust domain itself", td)
	}
	return td, nil
}

// federated returns every federated bundle, by trust domain.
func (s *bundleService) federated() []*spiffebundle.Bundle {
	var out []*spiffebundle.Bundle
	for _, r := range s.cfg.Bundles.Relations() {
		if b, ok := s.cfg.Bundles.Get(r.TrustDomain); ok {
			out = append(out, b)
		}
	}
	return out
}

// ListFederatedBundles lists page by page, for administrators.
func (s *bundleService) ListFederatedBundles(ctx context.Context, req *bundlev1.ListFederatedBundlesRequest) (*bundlev1.ListFederatedBundlesResponse, error) {
	if err := s.admin(ctx); err != nil {
		return nil, err
	}
	page, next := paginate(s.federated(), func(b *spiffebundle.Bundle) string { return b.TrustDomain().Name() }, req.PageSize, req.PageToken)
	resp := &bundlev1.ListFederatedBundlesResponse{NextPageToken: next}
	for _, b := range page {
		p, err := s.bundleProto(b, req.OutputMask)
		if err != nil {
			return nil, err
		}
		resp.Bundles = append(resp.Bundles, p)
	}
	return resp, nil
}

// when says in which case a foreign bundle is stored.
type when int

const (
	always when = iota
	ifAbsent
	ifPresent
)

// BatchCreateFederatedBundle adds bundles that are not there, for administrators.
func (s *bundleService) BatchCreateFederatedBundle(ctx context.Context, req *bundlev1.BatchCreateFederatedBundleRequest) (*bundlev1.BatchCreateFederatedBundleResponse, error) {
	if err := s.adminBatch(ctx, len(req.Bundle)); err != nil {
		return nil, err
	}
	resp := new(bundlev1.BatchCreateFederatedBundleResponse)
	for _, p := range req.Bundle {
		b, err := s.setBundle(p, nil, ifAbsent, req.OutputMask)
		s.refusedPart(ctx, "BatchCreateFederatedBundle", err)
		resp.Results = append(resp.Results, &bundlev1.BatchCreateFederatedBundleResponse_Result{Status: statusOf(err), Bundle: b})
	}
	return resp, nil
}

// BatchUpdateFederatedBundle changes the fields of present bundles that input_mask names, for administrators.
func (s *bundleService) BatchUpdateFederatedBundle(ctx context.Context, req *bundlev1.BatchUpdateFederatedBundleRequest) (*bundlev1.BatchUpdateFederatedBundleResponse, error) {
	if err := s.adminBatch(ctx, len(req.Bundle)); err != nil {
		return nil, err
	}
	resp := new(bundlev1.BatchUpdateFederatedBundleResponse)
	for _, p := range req.Bundle {
		b, err := s.setBundle(p, req.InputMask, ifPresent, req.OutputMask)
		s.refusedPart(ctx, "BatchUpdateFederatedBundle", err)
		resp.Results = append(resp.Results, &bundlev1.BatchUpdateFederatedBundleResponse_Result{Status: statusOf(err), Bundle: b})
	}
	return resp, nil
}

// BatchSetFederatedBundle adds or replaces bundles, for administrators.
func (s *bundleService) BatchSetFederatedBundle(ctx context.Context, req *bundlev1.BatchSetFederatedBundleRequest) (*bundlev1.BatchSetFederatedBundleResponse, error) {
	if err := s.adminBatch(ctx, len(req.Bundle)); err != nil {
		return nil, err
	}
	resp := new(bundlev1.BatchSetFederatedBundleResponse)
	for _, p := range req.Bundle {
		b, err := s.setBundle(p, nil, always, req.OutputMask)
		s.refusedPart(ctx, "BatchSetFederatedBundle", err)
		resp.Results = append(resp.Results, &bundlev1.BatchSetFederatedBundleResponse_Result{Status: statusOf(err), Bundle: b})
	}
	return resp, nil
}

func (s *service) adminBatch(ctx context.Context, n int) error {
	if err := s.admin(ctx); err != nil {
		return err
	}
	if n > maxBatch {
		return invalid("more than %d in one batch", maxBatch)
	}
	return nil
}

// setBundle stores an administrator's bundle. A trust domain without relation gets one.
func (s *service) setBundle(p *types.Bundle, input *types.BundleMask, w when, output *types.BundleMask) (*types.Bundle, error) {
	if p == nil {
		return nil, invalid("missing bundle")
	}
	td, err := s.foreignTD(p.TrustDomain)
	if err != nil {
		return nil, err
	}
	cur, have := s.cfg.Bundles.Get(td)
	switch {
	case w == ifAbsent && have:
		return nil, status.Errorf(codes.AlreadyExists, "bundle of %s already exists", td)
	case w == ifPresent && !have:
		return nil, status.Errorf(codes.NotFound, "bundle of %s not found", td)
	}
	if input != nil {
		merged, err := spiretypes.FromBundle(cur)
		if err != nil {
			return nil, s.internal("set bundle", err)
		}
		maskBundle(p, input, merged)
		p = merged
	}
	b, err := spiretypes.ToBundle(p)
	if err == nil {
		err = bundle.Check(b)
	}
	if err == nil && b.Empty() {
		err = bundle.ErrEmpty
	}
	if err != nil {
		return nil, invalid("%v", err)
	}
	if _, ok := s.cfg.Bundles.Related(td); !ok {
		if err := s.cfg.Bundles.Relate(bundle.Relation{TrustDomain: td}); err != nil {
			return nil, s.internal("set bundle", err)
		}
	}
	err = s.cfg.Bundles.Replace(td, b, "administrator")
	switch {
	case errors.Is(err, bundle.ErrEmpty):
		return nil, invalid("%v", err)
	case err != nil:
		return nil, s.internal("set bundle", err)
	}
	s.log.Info("federated bundle set", "of", td.Name())
	set, ok := s.cfg.Bundles.Get(td)
	if !ok {
		return nil, status.Errorf(codes.Aborted, "bundle of %s was removed meanwhile", td)
	}
	return s.bundleProto(set, output)
}

// BatchDeleteFederatedBundle deletes bundles, for administrators. A relation without a bundle endpoint goes with its
// bundle. RESTRICT refuses while an entry names the trust domain, DISSOCIATE takes it out of those, DELETE deletes them.
func (s *bundleService) BatchDeleteFederatedBundle(ctx context.Context, req *bundlev1.BatchDeleteFederatedBundleRequest) (*bundlev1.BatchDeleteFederatedBundleResponse, error) {
	if err := s.adminBatch(ctx, len(req.TrustDomains)); err != nil {
		return nil, err
	}
	resp := new(bundlev1.BatchDeleteFederatedBundleResponse)
	for _, name := range req.TrustDomains {
		resp.Results = append(resp.Results, &bundlev1.BatchDeleteFederatedBundleResponse_Result{
			Status: statusOf(s.deleteBundle(ctx, name, req.Mode)), TrustDomain: name})
	}
	return resp, nil
}

func (s *bundleService) deleteBundle(ctx context.Context, name string, mode bundlev1.BatchDeleteFederatedBundleRequest_Mode) error {
	td, err := s.foreignTD(name)
	if err != nil {
		return err
	}
	if _, ok := s.cfg.Bundles.Get(td); !ok {
		return status.Errorf(codes.NotFound, "bundle of %s not found", td)
	}
	for _, e := range s.reg.allEntries() {
		if !slices.Contains(e.FederatesWith, td.Name()) {
			continue
		}
		switch mode {
		case bundlev1.BatchDeleteFederatedBundleRequest_DELETE:
			_, err = s.reg.deleteEntry(ctx, e.Id)
		case bundlev1.BatchDeleteFederatedBundleRequest_DISSOCIATE:
			_, err = s.reg.putEntry(ctx, e.Id, func(cur *entryRecord) (*entryRecord, error) {
				if cur == nil {
					return nil, status.Errorf(codes.Aborted, "entry %q was deleted meanwhile", e.Id)
				}
				p := proto.Clone(cur.Entry).(*types.Entry)
				p.FederatesWith = slices.DeleteFunc(p.FederatesWith, func(n string) bool { return n == td.Name() })
				p.RevisionNumber++
				return newEntryRecord(p, cur.federateAll)
			})
		default:
			return status.Errorf(codes.FailedPrecondition, "entry %q federates with %s", e.Id, td)
		}
		if err != nil {
			return s.internal("delete bundle", err)
		}
	}
	if r, _ := s.cfg.Bundles.Related(td); r.URL == "" {
		err = s.cfg.Bundles.Unrelate(td)
	} else {
		err = s.cfg.Bundles.Remove(td)
	}
	if err != nil {
		return s.internal("delete bundle", err)
	}
	s.log.Info("federated bundle deleted", "of", td.Name())
	return nil
}

func (s *service) bundleProto(b *spiffebundle.Bundle, m *types.BundleMask) (*types.Bundle, error) {
	p, err := spiretypes.FromBundle(b)
	if err != nil {
		return nil, s.internal("encode bundle", err)
	}
	if b.TrustDomain() == s.td {
		s.markTainted(p)
	}
	if m == nil {
		return p, nil
	}
	out := &types.Bundle{TrustDomain: p.TrustDomain}
	maskBundle(p, m, out)
	return out, nil
}

// maskBundle copies the fields that m names.
func maskBundle(from *types.Bundle, m *types.BundleMask, to *types.Bundle) {
	if m.X509Authorities {
		to.X509Authorities = from.X509Authorities
	}
	if m.JwtAuthorities {
		to.JwtAuthorities = from.JwtAuthorities
	}
	if m.RefreshHint {
		to.RefreshHint = from.RefreshHint
	}
	if m.SequenceNumber {
		to.SequenceNumber = from.SequenceNumber
	}
}

// markTainted tells agents which authorities of the own bundle to leave, and when JWT keys end.
func (s *service) markTainted(p *types.Bundle) {
	tainted := map[string]bool{}
	if s.cfg.Tainted != nil {
		maps.Copy(tainted, s.cfg.Tainted())
	}
	for _, r := range s.cfg.Authority.Roots() {
		if r.Tainted {
			tainted[r.KeyID], tainted[r.JWTKeyID] = true, true
		}
	}
	ends := map[string]int64{} // of JWT keys
	for _, d := range s.cfg.Authority.Added() {
		if d.Tainted {
			tainted[d.KeyID()] = true
		}
		if d.Certificate == nil && !d.Expires.IsZero() {
			ends[d.JWTKeyID] = d.Expires.Unix()
		}
	}
	for _, r := range s.cfg.Authority.Roots() {
		ends[r.JWTKeyID] = r.Expires.Unix()
	}
	for _, c := range p.X509Authorities {
		if cert, err := x509.ParseCertificate(c.Asn1); err == nil {
			c.Tainted = tainted[hex.EncodeToString(cert.SubjectKeyId)]
		}
	}
	for _, k := range p.JwtAuthorities {
		k.Tainted, k.ExpiresAt = tainted[k.KeyId], ends[k.KeyId]
	}
}
