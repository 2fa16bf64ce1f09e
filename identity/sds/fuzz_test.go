package sds_test

import (
	"log/slog"
	"slices"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/hanse-mesh/hanse/identity"
	"github.com/hanse-mesh/hanse/identity/sds"
	"github.com/hanse-mesh/hanse/proxy/proxytest"
)

// registrar keeps the service, to call it without a connection.
type registrar struct {
	secretv3.SecretDiscoveryServiceServer
}

func (r *registrar) RegisterService(_ *grpc.ServiceDesc, impl any) {
	r.SecretDiscoveryServiceServer = impl.(secretv3.SecretDiscoveryServiceServer)
}

// FuzzRequest: whatever is asked for, the key is given by the workload's own names only, and what was not asked for is not answered.
func FuzzRequest(f *testing.F) {
	west, src, service := proxytest.NewDomain(f, "west.test"), identity.NewSource(), &registrar{}
	src.Set(west.SVID(path, time.Hour), map[spiffeid.TrustDomain]*spiffebundle.Bundle{west.TD: west.Bundle()})
	sds.Register(service, src, slog.New(slog.DiscardHandler))
	plain, err := structpb.NewStruct(map[string]any{"disable_spiffe_cert_validation": true})
	if err != nil {
		f.Fatal(err)
	}
	for _, names := range [][]string{nil, {"default", "ROOTCA"}, {"ALL"}, {ownID}, {"spiffe://west.test"}, {"spiffe://north.test/"}, {"spiffe://WEST.test"}} {
		for _, node := range []*corev3.Node{nil, {Id: "e", Metadata: plain}} {
			b, err := proto.Marshal(&discoveryv3.DiscoveryRequest{ResourceNames: names, Node: node, TypeUrl: typeURL})
			if err != nil {
				f.Fatal(err)
			}
			f.Add(b)
		}
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		req := &discoveryv3.DiscoveryRequest{}
		if proto.Unmarshal(b, req) != nil {
			return
		}
		resp, err := service.FetchSecrets(t.Context(), req)
		if err != nil {
			if status.Code(err) != codes.InvalidArgument {
				t.Errorf("%v: %v", req, err)
			}
			return
		}
		everything := !slices.ContainsFunc(req.ResourceNames, func(name string) bool { return name != "" })
		for _, a := range resp.Resources {
			s := &tlsv3.Secret{}
			if err := a.UnmarshalTo(s); err != nil {
				t.Fatal(err)
			}
			if !everything && !slices.Contains(req.ResourceNames, s.Name) {
				t.Errorf("%q is answered, which was not asked for", s.Name)
			}
			if own := s.Name == "default" || s.Name == ownID; own != (s.GetTlsCertificate() != nil) {
				t.Errorf("%q: %v", s.Name, s)
			}
		}
	})
}
