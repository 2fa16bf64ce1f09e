package sds

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"slices"
	"strconv"
	"sync"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/hanse-mesh/hanse/identity"
)

const (
	secretType = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"
	maxNames   = 1000
)

// Register adds the service to s. Whoever can call it gets the workload's private key.
func Register(s grpc.ServiceRegistrar, src *identity.Source, log *slog.Logger) {
	secretv3.RegisterSecretDiscoveryServiceServer(s, &server{src: src, log: log, nobody: sync.OnceValues(nobody)})
}

// server does not implement DeltaSecrets, as spire-agent does not.
type server struct {
	secretv3.UnimplementedSecretDiscoveryServiceServer
	src    *identity.Source
	log    *slog.Logger
	nobody func() ([]byte, error)
}

// wish is what somebody asks for.
type wish struct {
	names []string // sorted; none: everything
	plain bool     // CA certificates for Envoy's default validator, which knows no trust domains
}

func wishOf(req *discoveryv3.DiscoveryRequest, node *corev3.Node) (wish, error) {
	switch {
	case req.TypeUrl != "" && req.TypeUrl != secretType:
		return wish{}, status.Errorf(codes.InvalidArgument, "type_url %q: want %s", req.TypeUrl, secretType)
	case len(req.ResourceNames) > maxNames:
		return wish{}, status.Errorf(codes.InvalidArgument, "resource_names: %d of them, at most %d", len(req.ResourceNames), maxNames)
	}
	// SPIRE's switch, which Envoys' configurations have. Only true and its spellings turn the check off.
	v := node.GetMetadata().GetFields()["disable_spiffe_cert_validation"]
	plain, err := strconv.ParseBool(v.GetStringValue())
	w := wish{names: slices.Compact(slices.Sorted(slices.Values(req.ResourceNames))), plain: v.GetBoolValue() || err == nil && plain}
	w.names = slices.DeleteFunc(w.names, func(name string) bool { return name == "" })
	return w, nil
}

// FetchSecrets answers once.
func (s *server) FetchSecrets(ctx context.Context, req *discoveryv3.DiscoveryRequest) (*discoveryv3.DiscoveryResponse, error) {
	w, err := wishOf(req, req.Node)
	if err != nil {
		return nil, err
	}
	if err := s.src.Wait(ctx); err != nil {
		return nil, status.FromContextError(ctx.Err()).Err()
	}
	secrets, err := s.secrets(w)
	if err != nil {
		return nil, err
	}
	return &discoveryv3.DiscoveryResponse{TypeUrl: secretType, Resources: secrets}, nil
}

// StreamSecrets answers each wish for more than before, and when a Secret of the wish has changed. It waits for the first SVID.
func (s *server) StreamSecrets(stream secretv3.SecretDiscoveryService_StreamSecretsServer) error {
	reqs, ended := make(chan *discoveryv3.DiscoveryRequest), make(chan error, 1)
	go func() { // ends with the stream
		for {
			req, err := stream.Recv()
			if err != nil {
				ended <- err
				return
			}
			select {
			case reqs <- req:
			case <-stream.Context().Done():
			}
		}
	}()
	var (
		node  *corev3.Node
		asked bool
		owed  bool // an answer: a name has been added
		w     wish
		last  []*anypb.Any
		sent  int // versions and nonces of this stream

		refused int // what was logged
	)
	for {
		changed := s.src.Changed()
		if _, err := s.src.GetX509SVID(); err == nil && asked {
			secrets, err := s.secrets(w)
			if err != nil {
				return err
			}
			same := slices.EqualFunc(secrets, last, func(a, b *anypb.Any) bool { return proto.Equal(a, b) })
			if !same || owed {
				sent++
				version := strconv.Itoa(sent)
				if err := stream.Send(&discoveryv3.DiscoveryResponse{TypeUrl: secretType, VersionInfo: version, Nonce: version, Resources: secrets}); err != nil {
					return err
				}
				last = secrets
			}
			owed = false
		}
		select {
		case <-changed:
		case err := <-ended:
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		case req := <-reqs:
			if req.Node != nil {
				node = req.Node // sent once
			}
			if sent > 0 && req.ResponseNonce != strconv.Itoa(sent) {
				continue // of an earlier answer; that to the last one will come
			}
			if req.ErrorDetail != nil && refused < sent {
				refused = sent
				s.log.Warn("Envoy has refused its secrets, and keeps the last", "node", node.GetId(), "names", w.names, "error", req.ErrorDetail.Message)
			}
			next, err := wishOf(req, node)
			if err != nil {
				return err
			}
			if !slices.Equal(next.names, w.names) {
				s.strangers(next, node)
			}
			// Envoy has dropped what it did not name in between, also where that is the same Secrets: no name is everything to us, nothing to it.
			owed = owed || slices.ContainsFunc(next.names, func(name string) bool { return !slices.Contains(w.names, name) })
			w, asked = next, true
		}
	}
}

// strangers logs what is asked for in vain, which shows in Envoy as refused peers only.
func (s *server) strangers(w wish, node *corev3.Node) {
	bundles := s.src.Bundles()
	for _, name := range w.names {
		if td, ok := trustDomain(name); ok && bundles[td] == nil {
			s.log.Warn("Envoy asks for a trust domain that this workload does not federate with: until it does, the secret trusts nobody", "trust_domain", td.Name(), "node", node.GetId())
		}
	}
}
