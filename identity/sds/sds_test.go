package sds_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/pem"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/hanse-mesh/hanse/identity"
	"github.com/hanse-mesh/hanse/identity/sds"
	"github.com/hanse-mesh/hanse/proxy/proxytest"
)

const (
	path  = "/ns/shop/sa/frontend"
	ownID = "spiffe://west.test" + path
)

// lab is a workload of west, which federates with east, and a connection to its service.
type lab struct {
	t          *testing.T
	west, east *proxytest.Domain
	src        *identity.Source
	client     secretv3.SecretDiscoveryServiceClient
	log        *bytes.Buffer
}

// inLab runs f in a bubble.
func inLab(t *testing.T, f func(t *testing.T, l *lab)) {
	synctest.Test(t, func(t *testing.T) {
		l := &lab{t: t, west: proxytest.NewDomain(t, "west.test"), east: proxytest.NewDomain(t, "east.test"), src: identity.NewSource(), log: &bytes.Buffer{}}
		lis, s := bufconn.Listen(1<<20), grpc.NewServer()
		sds.Register(s, l.src, slog.New(slog.NewTextHandler(l.log, nil)))
		go func() { _ = s.Serve(lis) }()
		defer s.Stop()
		conn, err := grpc.NewClient("passthrough:///sds", grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return lis.DialContext(ctx) }))
		check(t, err)
		defer conn.Close()
		l.client = secretv3.NewSecretDiscoveryServiceClient(conn)
		f(t, l)
	})
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// set gives the workload an SVID and these bundles.
func (l *lab) set(domains ...*proxytest.Domain) {
	bundles := map[spiffeid.TrustDomain]*spiffebundle.Bundle{}
	for _, d := range domains {
		bundles[d.TD] = d.Bundle()
	}
	l.src.Set(l.west.SVID(path, time.Hour), bundles)
}

// envoy is a stream, with the answers that have come.
type envoy struct {
	*lab
	secretv3.SecretDiscoveryService_StreamSecretsClient
	answers chan *discoveryv3.DiscoveryResponse
	failure error // once answers is closed
}

func (l *lab) envoy() *envoy {
	l.t.Helper()
	ctx, cancel := context.WithCancel(l.t.Context())
	l.t.Cleanup(cancel)
	stream, err := l.client.StreamSecrets(ctx)
	check(l.t, err)
	e := &envoy{lab: l, SecretDiscoveryService_StreamSecretsClient: stream, answers: make(chan *discoveryv3.DiscoveryResponse, 16)}
	go func() {
		defer close(e.answers)
		for {
			resp, err := stream.Recv()
			if err != nil {
				e.failure = err
				return
			}
			e.answers <- resp
		}
	}()
	return e
}

func (e *envoy) ask(nonce string, names ...string) {
	e.t.Helper()
	check(e.t, e.Send(&discoveryv3.DiscoveryRequest{Node: &corev3.Node{Id: "e1"}, TypeUrl: typeURL, ResourceNames: names, ResponseNonce: nonce, VersionInfo: nonce}))
}

const typeURL = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"

// next is the answer that has come when nothing moves any more: nil if none has.
func (e *envoy) next() *discoveryv3.DiscoveryResponse {
	e.t.Helper()
	synctest.Wait()
	select {
	case resp, ok := <-e.answers:
		if !ok {
			e.t.Fatalf("the stream has ended: %v", e.failure)
		}
		return resp
	default:
		return nil
	}
}

// secrets of an answer, by name.
func secrets(t *testing.T, resp *discoveryv3.DiscoveryResponse) map[string]*tlsv3.Secret {
	t.Helper()
	if resp == nil {
		t.Fatal("no answer")
	}
	out := map[string]*tlsv3.Secret{}
	for _, a := range resp.Resources {
		s := &tlsv3.Secret{}
		check(t, a.UnmarshalTo(s))
		check(t, s.ValidateAll())
		out[s.Name] = s
	}
	if resp.TypeUrl != typeURL || len(out) != len(resp.Resources) {
		t.Errorf("%s, %d resources with %d names", resp.TypeUrl, len(resp.Resources), len(out))
	}
	return out
}

// trusted says whom a Secret of Envoy's SPIFFE validator trusts: for each trust domain, whether an SVID of each issuer in it is accepted.
func trusted(t *testing.T, s *tlsv3.Secret, issuers ...*proxytest.Domain) string {
	t.Helper()
	v := s.GetValidationContext()
	if v.GetTrustedCa() != nil || v.GetCustomValidatorConfig().GetName() != "envoy.tls.cert_validator.spiffe" {
		t.Fatalf("not for the SPIFFE validator: %v", s)
	}
	config := &tlsv3.SPIFFECertValidatorConfig{}
	check(t, v.CustomValidatorConfig.TypedConfig.UnmarshalTo(config))
	check(t, config.ValidateAll())
	var out []string
	for _, td := range config.TrustDomains {
		said := td.Name + ":"
		b, err := x509bundle.Parse(spiffeid.RequireTrustDomainFromString(td.Name), td.TrustBundle.GetInlineBytes())
		check(t, err)
		if b.Empty() {
			t.Errorf("the bundle of %s is empty, which Envoy refuses", td.Name)
		}
		for _, d := range issuers {
			if _, _, err := x509svid.Verify(d.SVID("/x", time.Hour).Certificates, b); err == nil {
				said += d.TD.Name()
			}
		}
		out = append(out, said)
	}
	return strings.Join(out, " ")
}

func names(m map[string]*tlsv3.Secret) string {
	var out []string
	for name := range m {
		out = append(out, name)
	}
	slices.Sort(out)
	return fmt.Sprint(out)
}

func TestNames(t *testing.T) {
	inLab(t, func(t *testing.T, l *lab) {
		l.set(l.west, l.east)
		for _, c := range []struct {
			ask    []string
			want   string
			trusts map[string]string
		}{
			{[]string{"default"}, "[default]", nil},
			{[]string{ownID, "default", "", "default"}, "[default " + ownID + "]", nil},
			{[]string{"ROOTCA"}, "[ROOTCA]", map[string]string{"ROOTCA": "west.test:west.test"}},
			{[]string{"ALL", "ROOTCA"}, "[ALL ROOTCA]", map[string]string{"ALL": "east.test:east.test west.test:west.test", "ROOTCA": "west.test:west.test"}},
			{[]string{"spiffe://east.test", "spiffe://west.test"}, "[spiffe://east.test spiffe://west.test]",
				map[string]string{"spiffe://east.test": "east.test:east.test", "spiffe://west.test": "west.test:west.test"}},
			{[]string{"spiffe://north.test"}, "[spiffe://north.test]", map[string]string{"spiffe://north.test": "north.test:"}},
			{nil, "[spiffe://east.test spiffe://west.test " + ownID + "]", map[string]string{"spiffe://east.test": "east.test:east.test"}},
		} {
			resp, err := l.client.FetchSecrets(t.Context(), &discoveryv3.DiscoveryRequest{ResourceNames: c.ask})
			check(t, err)
			e := l.envoy()
			e.ask("", c.ask...)
			for _, got := range []map[string]*tlsv3.Secret{secrets(t, resp), secrets(t, e.next())} {
				if names(got) != c.want {
					t.Errorf("%v: %s, want %s", c.ask, names(got), c.want)
				}
				for name, want := range c.trusts {
					if said := trusted(t, got[name], l.west, l.east); said != want {
						t.Errorf("%v: %s trusts %s, want %s", c.ask, name, said, want)
					}
				}
				for name, s := range got {
					if strings.HasPrefix(name, "default") || name == ownID {
						_, err := tls.X509KeyPair(s.GetTlsCertificate().GetCertificateChain().GetInlineBytes(), s.GetTlsCertificate().GetPrivateKey().GetInlineBytes())
						check(t, err)
					}
				}
			}
		}
		if !strings.Contains(l.log.String(), "trust_domain=north.test") || strings.Contains(l.log.String(), "PRIVATE") {
			t.Errorf("log: %s", l.log)
		}
	})
}

func TestRefusals(t *testing.T) {
	inLab(t, func(t *testing.T, l *lab) {
		l.set(l.west, l.east)
		plain, err := structpb.NewStruct(map[string]any{"disable_spiffe_cert_validation": "true"})
		check(t, err)
		for _, c := range []struct {
			req  *discoveryv3.DiscoveryRequest
			want string
		}{
			{&discoveryv3.DiscoveryRequest{ResourceNames: []string{"default", "spiffe://west.test/ns/shop/sa/admin"}}, `"spiffe://west.test/ns/shop/sa/admin" is not for this workload`},
			{&discoveryv3.DiscoveryRequest{ResourceNames: []string{"spiffe://east.test/"}}, "is not for this workload"},
			{&discoveryv3.DiscoveryRequest{ResourceNames: []string{"west.test"}}, "is not for this workload"},
			{&discoveryv3.DiscoveryRequest{ResourceNames: slices.Repeat([]string{"default"}, 1001)}, "at most 1000"},
			{&discoveryv3.DiscoveryRequest{TypeUrl: "type.googleapis.com/envoy.config.cluster.v3.Cluster"}, "type_url"},
			{&discoveryv3.DiscoveryRequest{ResourceNames: []string{"ALL"}, Node: &corev3.Node{Metadata: plain}}, "needs Envoy's SPIFFE validator"},
		} {
			_, err := l.client.FetchSecrets(t.Context(), c.req)
			e := l.envoy()
			check(t, e.Send(c.req))
			synctest.Wait()
			if resp := <-e.answers; resp != nil {
				t.Errorf("%v: the stream answers", c.req)
				continue
			}
			for _, err := range []error{err, e.failure} {
				if status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), c.want) {
					t.Errorf("%v, want %q", err, c.want)
				}
			}
		}
		// CA certificates alone, where Envoy's configuration says so.
		resp, err := l.client.FetchSecrets(t.Context(), &discoveryv3.DiscoveryRequest{ResourceNames: []string{"ROOTCA"}, Node: &corev3.Node{Metadata: plain}})
		check(t, err)
		v := secrets(t, resp)["ROOTCA"].GetValidationContext()
		want := l.west.Bundle().X509Authorities()[0].Raw
		if block, _ := pem.Decode(v.GetTrustedCa().GetInlineBytes()); v.GetCustomValidatorConfig() != nil || block == nil || !bytes.Equal(block.Bytes, want) {
			t.Errorf("%v", v)
		}
		if stream, err := l.client.DeltaSecrets(t.Context()); err == nil {
			_, err = stream.Recv()
			if status.Code(err) != codes.Unimplemented {
				t.Errorf("DeltaSecrets: %v", err)
			}
		}
	})
}

// What changes is sent again, and nothing else is.
func TestStream(t *testing.T) {
	inLab(t, func(t *testing.T, l *lab) {
		e, roots := l.envoy(), l.envoy()
		e.ask("", "default", "spiffe://east.test")
		roots.ask("", "ROOTCA")
		if e.next() != nil {
			t.Error("an answer before there is an SVID")
		}
		l.set(l.west)
		first := e.next()
		got := secrets(t, first)
		if said := trusted(t, got["spiffe://east.test"], l.west, l.east); said != "east.test:" {
			t.Errorf("without a bundle: %s", said)
		}
		e.ask(first.Nonce, "default", "spiffe://east.test")
		root := roots.next()
		roots.ask(root.Nonce, "ROOTCA")
		if e.next() != nil || roots.next() != nil {
			t.Error("an acknowledgement is answered")
		}

		l.set(l.west, l.east) // renewal, and federation
		second := e.next()
		renewed := secrets(t, second)
		if said := trusted(t, renewed["spiffe://east.test"], l.west, l.east); said != "east.test:east.test" || second.Nonce == first.Nonce || second.VersionInfo == first.VersionInfo {
			t.Errorf("federated: %s; nonce %s, version %s", said, second.Nonce, second.VersionInfo)
		}
		if bytes.Equal(renewed["default"].GetTlsCertificate().GetPrivateKey().GetInlineBytes(), got["default"].GetTlsCertificate().GetPrivateKey().GetInlineBytes()) {
			t.Error("the old key")
		}
		if roots.next() != nil {
			t.Error("the same bundle is sent again")
		}

		e.ask(first.Nonce, "ROOTCA") // crossed the second answer
		if e.next() != nil {
			t.Error("a request with an old nonce is answered")
		}
		check(t, e.Send(&discoveryv3.DiscoveryRequest{VersionInfo: first.VersionInfo, ResponseNonce: second.Nonce, ResourceNames: []string{"default", "spiffe://east.test"},
			ErrorDetail: &rpcstatus.Status{Message: "cannot load it"}}))
		if e.next() != nil {
			t.Error("a refusal is answered with the same")
		}
		if !strings.Contains(l.log.String(), "cannot load it") || !strings.Contains(l.log.String(), "node=e1") {
			t.Errorf("log: %s", l.log)
		}

		e.ask(second.Nonce) // unsubscribes from all
		all := e.next()
		everything := slices.Sorted(maps.Keys(secrets(t, all)))
		e.ask(all.Nonce, everything...)
		again := e.next()
		if names(secrets(t, again)) != names(secrets(t, all)) || again.Nonce == all.Nonce {
			t.Errorf("names were added, and the answer is the same: %v", again)
		}
		e.ask(again.Nonce, everything...)
		if e.next() != nil {
			t.Error("an acknowledgement is answered")
		}
		e.ask(again.Nonce, "spiffe://east.test")
		third := e.next()
		if names(secrets(t, third)) != "[spiffe://east.test]" {
			t.Errorf("other names: %v", third)
		}

		l.set(l.west) // east is distrusted
		if said := trusted(t, secrets(t, e.next())["spiffe://east.test"], l.west, l.east); said != "east.test:" {
			t.Errorf("distrusted: %s", said)
		}
		check(t, e.CloseSend())
		synctest.Wait()
		if _, more := <-e.answers; more {
			t.Error("an answer after the end")
		}
	})
}
