package sds

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"maps"
	"math/big"
	"slices"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

// Names that Envoys' configurations have from SPIRE.
const (
	ownSVID    = "default"
	ownBundle  = "ROOTCA"
	allBundles = "ALL"
)

// secrets makes what is wished, in the order of the names. There must be an SVID.
func (s *server) secrets(w wish) ([]*anypb.Any, error) {
	svid, err := s.src.GetX509SVID()
	if err != nil {
		return nil, status.Error(codes.Unavailable, err.Error())
	}
	m := maker{svid: svid, bundles: s.src.Bundles(), plain: w.plain, nobody: s.nobody}
	names := w.names
	if len(names) == 0 {
		names = []string{svid.ID.String()}
		for td := range m.bundles {
			names = append(names, td.IDString())
		}
		slices.Sort(names)
	}
	var out []*anypb.Any
	for _, name := range names {
		secret, err := m.secret(name)
		if err != nil {
			return nil, err
		}
		a, err := marshal(secret)
		if err != nil {
			return nil, status.Errorf(codes.Internal, "secret %q: %v", name, err)
		}
		out = append(out, a)
	}
	return out, nil
}

// maker makes the Secrets of one moment.
type maker struct {
	svid    *x509svid.SVID
	bundles map[spiffeid.TrustDomain]*spiffebundle.Bundle
	plain   bool
	nobody  func() ([]byte, error)
}

func (m maker) secret(name string) (*tlsv3.Secret, error) {
	own := m.svid.ID.TrustDomain()
	switch name {
	case ownSVID, m.svid.ID.String():
		return m.certificate(name)
	case ownBundle:
		return m.trust(name, own)
	case allBundles:
		if m.plain { // any of these CAs could then speak for any trust domain
			return nil, status.Errorf(codes.InvalidArgument, "resource_names: %s needs Envoy's SPIFFE validator: remove disable_spiffe_cert_validation from the node's metadata, or ask for the trust domains one by one", name)
		}
		return m.trust(name, slices.SortedFunc(maps.Keys(m.bundles), spiffeid.TrustDomain.Compare)...)
	}
	td, ok := trustDomain(name)
	if !ok {
		return nil, status.Errorf(codes.InvalidArgument, "resource_names: %q is not for this workload, which is %s: want %s, %s, %s, its SPIFFE ID or spiffe:// with a trust domain", name, m.svid.ID, ownSVID, ownBundle, allBundles)
	}
	return m.trust(name, td)
}

// trustDomain reads a name such as spiffe://east.example.
func trustDomain(name string) (spiffeid.TrustDomain, bool) {
	td, err := spiffeid.TrustDomainFromString(name)
	return td, err == nil && name == td.IDString()
}

func (m maker) certificate(name string) (*tlsv3.Secret, error) {
	chain, key, err := m.svid.Marshal()
	if err != nil {
		return nil, status.Errorf(codes.Internal, "encode X509-SVID: %v", err)
	}
	return &tlsv3.Secret{Name: name, Type: &tlsv3.Secret_TlsCertificate{TlsCertificate: &tlsv3.TlsCertificate{CertificateChain: inline(chain), PrivateKey: inline(key)}}}, nil
}

func (m maker) trust(name string, tds ...spiffeid.TrustDomain) (*tlsv3.Secret, error) {
	context, config := &tlsv3.CertificateValidationContext{}, &tlsv3.SPIFFECertValidatorConfig{}
	for _, td := range tds {
		roots, err := m.roots(td)
		if err != nil {
			return nil, status.Errorf(codes.Internal, "bundle of %s: %v", td, err)
		}
		context.TrustedCa = inline(roots)
		config.TrustDomains = append(config.TrustDomains, &tlsv3.SPIFFECertValidatorConfig_TrustDomain{Name: td.Name(), TrustBundle: inline(roots)})
	}
	if !m.plain {
		a, err := marshal(config)
		if err != nil {
			return nil, status.Errorf(codes.Internal, "secret %q: %v", name, err)
		}
		context.TrustedCa, context.CustomValidatorConfig = nil, &corev3.TypedExtensionConfig{Name: "envoy.tls.cert_validator.spiffe", TypedConfig: a}
	}
	return &tlsv3.Secret{Name: name, Type: &tlsv3.Secret_ValidationContext{ValidationContext: context}}, nil
}

// roots are td's X.509 authorities, or nobody's where it has none: Envoy wants one.
func (m maker) roots(td spiffeid.TrustDomain) ([]byte, error) {
	var out bytes.Buffer
	if b := m.bundles[td]; b != nil {
		for _, c := range b.X509Authorities() {
			if err := pem.Encode(&out, &pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}); err != nil {
				return nil, err
			}
		}
	}
	if out.Len() == 0 {
		return m.nobody()
	}
	return out.Bytes(), nil
}

// nobody is the certificate of a CA whose key is gone.
func nobody() ([]byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make key: %w", err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "nobody is trusted"}, NotBefore: time.Unix(0, 0),
		NotAfter: time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, fmt.Errorf("make certificate: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), nil
}

func inline(b []byte) *corev3.DataSource {
	return &corev3.DataSource{Specifier: &corev3.DataSource_InlineBytes{InlineBytes: b}}
}

// marshal gives the same bytes for the same message.
func marshal(m proto.Message) (*anypb.Any, error) {
	a := &anypb.Any{}
	err := anypb.MarshalFrom(a, m, proto.MarshalOptions{Deterministic: true})
	return a, err
}
