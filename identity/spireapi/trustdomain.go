package spireapi

import (
	"context"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	trustdomainv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/trustdomain/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/hanse-mesh/hanse/identity/bundle"
)

// trustDomainService serves those relations that have a bundle endpoint. All its methods are for administrators.
type trustDomainService struct {
	trustdomainv1.UnimplementedTrustDomainServer
	service
}

// ListFederationRelationships lists page by page.
func (s *trustDomainService) ListFederationRelationships(ctx context.Context, req *trustdomainv1.ListFederationRelationshipsRequest) (*trustdomainv1.ListFederationRelationshipsResponse, error) {
	if err := s.admin(ctx); err != nil {
		return nil, err
	}
	var all []bundle.Relation
	for _, r := range s.cfg.Bundles.Relations() {
		if r.URL != "" {
			all = append(all, r)
		}
	}
	page, next := paginate(all, func(r bundle.Relation) string { return r.TrustDomain.Name() }, req.PageSize, req.PageToken)
	resp := &trustdomainv1.ListFederationRelationshipsResponse{NextPageToken: next}
	for _, r := range page {
		p, err := s.relationProto(r, req.OutputMask)
		if err != nil {
			return nil, err
		}
		resp.FederationRelationships = append(resp.FederationRelationships, p)
	}
	return resp, nil
}

// GetFederationRelationship returns one.
func (s *trustDomainService) GetFederationRelationship(ctx context.Context, req *trustdomainv1.GetFederationRelationshipRequest) (*types.FederationRelationship, error) {
	if err := s.admin(ctx); err != nil {
		return nil, err
	}
	r, err := s.named(req.TrustDomain)
	if err != nil {
		return nil, err
	}
	return s.relationProto(r, req.OutputMask)
}

func (s *trustDomainService) named(name string) (bundle.Relation, error) {
	td, err := s.foreignTD(name)
	if err != nil {
		return bundle.Relation{}, err
	}
	r, ok := s.cfg.Bundles.Related(td)
	if !ok || r.URL == "" {
		return bundle.Relation{}, status.Errorf(codes.NotFound, "federation relationship with %s does not exist", td)
	}
	return r, nil
}

// BatchCreateFederationRelationship adds relations.
func (s *trustDomainService) BatchCreateFederationRelationship(ctx context.Context, req *trustdomainv1.BatchCreateFederationRelationshipRequest) (*trustdomainv1.BatchCreateFederationRelationshipResponse, error) {
	if err := s.adminBatch(ctx, len(req.FederationRelationships)); err != nil {
		return nil, err
	}
	resp := new(trustdomainv1.BatchCreateFederationRelationshipResponse)
	for _, p := range req.FederationRelationships {
		if r, err := s.named(p.GetTrustDomain()); err == nil {
			err = status.Errorf(codes.AlreadyExists, "federation relationship with %s already exists", r.TrustDomain)
			resp.Results = append(resp.Results, &trustdomainv1.BatchCreateFederationRelationshipResponse_Result{Status: statusOf(err)})
			continue
		}
		out, err := s.setRelation(p, bundle.Relation{}, nil, req.OutputMask)
		s.refusedPart(ctx, "BatchCreateFederationRelationship", err)
		resp.Results = append(resp.Results, &trustdomainv1.BatchCreateFederationRelationshipResponse_Result{Status: statusOf(err), FederationRelationship: out})
	}
	return resp, nil
}

// BatchUpdateFederationRelationship changes the fields that input_mask names.
func (s *trustDomainService) BatchUpdateFederationRelationship(ctx context.Context, req *trustdomainv1.BatchUpdateFederationRelationshipRequest) (*trustdomainv1.BatchUpdateFederationRelationshipResponse, error) {
	if err := s.adminBatch(ctx, len(req.FederationRelationships)); err != nil {
		return nil, err
	}
	resp := new(trustdomainv1.BatchUpdateFederationRelationshipResponse)
	for _, p := range req.FederationRelationships {
		var out *types.FederationRelationship
		cur, err := s.named(p.GetTrustDomain())
		if err == nil {
			out, err = s.setRelation(p, cur, req.InputMask, req.OutputMask)
		}
		resp.Results = append(resp.Results, &trustdomainv1.BatchUpdateFederationRelationshipResponse_Result{Status: statusOf(err), FederationRelationship: out})
	}
	return resp, nil
}

// setRelation stores cur with the fields of p that input names.
func (s *trustDomainService) setRelation(p *types.FederationRelationship, cur bundle.Relation, input, output *types.FederationRelationshipMask) (*types.FederationRelationship, error) {
	td, err := s.foreignTD(p.GetTrustDomain())
	if err != nil {
		return nil, err
	}
	r := cur
	r.TrustDomain = td
	if input == nil || input.BundleEndpointUrl {
		r.URL = p.BundleEndpointUrl
	}
	if input == nil || input.BundleEndpointProfile {
		switch profile := p.BundleEndpointProfile.(type) {
		case *types.FederationRelationship_HttpsWeb:
			r.Profile, r.EndpointID = bundle.HTTPSWeb, spiffeid.ID{}
		case *types.FederationRelationship_HttpsSpiffe:
			r.Profile = bundle.HTTPSSPIFFE
			if r.EndpointID, err = spiffeid.FromString(profile.HttpsSpiffe.GetEndpointSpiffeId()); err != nil {
				return nil, invalid("endpoint SPIFFE ID: %v", err)
			}
		default:
			return nil, invalid("missing bundle endpoint profile")
		}
	}
	if r.URL == "" {
		return nil, invalid("missing bundle endpoint URL")
	}
	if err := s.cfg.Bundles.Relate(r); err != nil {
		return nil, invalid("%v", err)
	}
	if b := p.TrustDomainBundle; b != nil && (input == nil || input.TrustDomainBundle) {
		if b.TrustDomain != td.Name() {
			return nil, invalid("the bundle is of %q, not of %s", b.TrustDomain, td)
		}
		if _, err := s.setBundle(b, nil, always, nil); err != nil {
			return nil, err
		}
	}
	s.log.Info("federation relationship set", "with", td.Name(), "url", r.URL)
	return s.relationProto(r, output)
}

// BatchDeleteFederationRelationship ends relations; their trust domains are not trusted any more.
func (s *trustDomainService) BatchDeleteFederationRelationship(ctx context.Context, req *trustdomainv1.BatchDeleteFederationRelationshipRequest) (*trustdomainv1.BatchDeleteFederationRelationshipResponse, error) {
	if err := s.adminBatch(ctx, len(req.TrustDomains)); err != nil {
		return nil, err
	}
	resp := new(trustdomainv1.BatchDeleteFederationRelationshipResponse)
	for _, name := range req.TrustDomains {
		r, err := s.named(name)
		if err == nil {
			if err = s.cfg.Bundles.Unrelate(r.TrustDomain); err != nil {
				err = s.internal("delete federation relationship", err)
			} else {
				s.log.Info("federation relationship deleted", "with", r.TrustDomain.Name())
			}
		}
		resp.Results = append(resp.Results, &trustdomainv1.BatchDeleteFederationRelationshipResponse_Result{Status: statusOf(err), TrustDomain: name})
	}
	return resp, nil
}

// RefreshBundle pulls a bundle from its endpoint now.
func (s *trustDomainService) RefreshBundle(ctx context.Context, req *trustdomainv1.RefreshBundleRequest) (*emptypb.Empty, error) {
	if err := s.admin(ctx); err != nil {
		return nil, err
	}
	r, err := s.named(req.TrustDomain)
	if err != nil {
		return nil, err
	}
	if s.cfg.Refresh == nil {
		return nil, status.Error(codes.Unimplemented, "this server does not pull from bundle endpoints")
	}
	if err := s.cfg.Refresh(ctx, r.TrustDomain); err != nil {
		return nil, status.Errorf(codes.Unavailable, "%v", err)
	}
	return &emptypb.Empty{}, nil
}

func (s *trustDomainService) relationProto(r bundle.Relation, m *types.FederationRelationshipMask) (*types.FederationRelationship, error) {
	all := m == nil
	p := &types.FederationRelationship{TrustDomain: r.TrustDomain.Name()}
	if all || m.BundleEndpointUrl {
		p.BundleEndpointUrl = r.URL
	}
	if all || m.BundleEndpointProfile {
		if r.Profile == bundle.HTTPSWeb {
			p.BundleEndpointProfile = &types.FederationRelationship_HttpsWeb{HttpsWeb: &types.HTTPSWebProfile{}}
		} else {
			p.BundleEndpointProfile = &types.FederationRelationship_HttpsSpiffe{HttpsSpiffe: &types.HTTPSSPIFFEProfile{EndpointSpiffeId: r.EndpointID.String()}}
		}
	}
	if all || m.TrustDomainBundle {
		if b, ok := s.cfg.Bundles.Get(r.TrustDomain); ok {
			var err error
			if p.TrustDomainBundle, err = s.bundleProto(b, nil); err != nil {
				return nil, err
			}
		}
	}
	return p, nil
}
