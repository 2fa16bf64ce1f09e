package identity

import (
	"crypto/tls"
	"errors"
	"fmt"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// Authorizer decides whether a peer with a verified SPIFFE ID may connect.
type Authorizer func(peer spiffeid.ID) error

// AuthorizeAny accepts every ID whose bundle is trusted.
func AuthorizeAny() Authorizer { return func(spiffeid.ID) error { return nil } }

// AuthorizeID accepts exactly one ID.
func AuthorizeID(want spiffeid.ID) Authorizer { return AuthorizeOneOf(want) }

// AuthorizeOneOf accepts exactly the given IDs.
func AuthorizeOneOf(want ...spiffeid.ID) Authorizer {
	return func(peer spiffeid.ID) error {
		for _, w := range want {
			if peer == w {
				return nil
			}
		}
		return fmt.Errorf("peer is %s, want %v", peer, want)
	}
}

// AuthorizeMemberOf accepts every ID of one trust domain.
func AuthorizeMemberOf(td spiffeid.TrustDomain) Authorizer {
	return func(peer spiffeid.ID) error {
		if !peer.MemberOf(td) {
			return fmt.Errorf("peer is %s, want a member of %s", peer, td)
		}
		return nil
	}
}

// ServerTLS returns a mutual TLS 1.3 server configuration over src. nextProtos are the ALPN protocols, first preferred.
// Session tickets are off: resumption would let a withdrawn authority back in.
func ServerTLS(src *Source, authorize Authorizer, nextProtos ...string) *tls.Config {
	return &tls.Config{
		MinVersion:             tls.VersionTLS13,
		NextProtos:             nextProtos,
		ClientAuth:             tls.RequireAnyClientCert, // verified below, against the bundle of the peer's own trust domain
		SessionTicketsDisabled: true,
		GetCertificate:         func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return certificate(src) },
		VerifyConnection:       verifier(src, authorize),
	}
}

// ClientTLS returns a mutual TLS 1.3 client configuration over src.
func ClientTLS(src *Source, authorize Authorizer, nextProtos ...string) *tls.Config {
	return &tls.Config{
		MinVersion:             tls.VersionTLS13,
		NextProtos:             nextProtos,
		InsecureSkipVerify:     true, // SVIDs carry no host names; VerifyConnection verifies chain and ID
		SessionTicketsDisabled: true,
		GetClientCertificate:   func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return certificate(src) },
		VerifyConnection:       verifier(src, authorize),
	}
}

// PeerID returns the SPIFFE ID of a connection that a configuration of this package has verified.
func PeerID(state tls.ConnectionState) (spiffeid.ID, error) {
	if len(state.PeerCertificates) == 0 {
		return spiffeid.ID{}, errors.New("peer presented no certificate")
	}
	return x509svid.IDFromCert(state.PeerCertificates[0])
}

func certificate(src *Source) (*tls.Certificate, error) {
	svid, err := src.presented()
	if err != nil {
		return nil, err
	}
	cert := &tls.Certificate{PrivateKey: svid.PrivateKey, Leaf: svid.Certificates[0]}
	for _, c := range svid.Certificates {
		cert.Certificate = append(cert.Certificate, c.Raw)
	}
	return cert, nil
}

func verifier(src *Source, authorize Authorizer) func(tls.ConnectionState) error {
	return func(state tls.ConnectionState) error {
		if len(state.PeerCertificates) == 0 {
			return errors.New("peer presented no certificate")
		}
		id, err := src.Verify(state.PeerCertificates)
		if err != nil {
			return fmt.Errorf("verify peer: %w", err)
		}
		if err := authorize(id); err != nil {
			return fmt.Errorf("authorize peer: %w", err)
		}
		return nil
	}
}
