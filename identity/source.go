package identity

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"maps"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// ErrNoSVID is returned by a Source that has no X509-SVID yet.
var ErrNoSVID = errors.New("no X509-SVID yet")

// Source holds the current X509-SVID and the bundles of all trusted domains. It implements go-spiffe's x509svid.Source
// and x509bundle.Source; unlike go-spiffe's X509Source it can rotate while handshakes read (design note 16).
type Source struct {
	state atomic.Pointer[sourceState]

	mu sync.Mutex // serialises writers
}

// sourceState is immutable once stored.
type sourceState struct {
	svid    *x509svid.SVID
	bundles map[spiffeid.TrustDomain]*spiffebundle.Bundle
	changed chan struct{} // closed when this state is replaced

	// Of a drill: see fault.go.
	fault   Fault
	expired *x509svid.SVID                                // presented instead of svid; nil: none
	verify  map[spiffeid.TrustDomain]*spiffebundle.Bundle // bundles without what fault distrusts
}

// NewSource returns an empty Source.
func NewSource() *Source {
	s := &Source{}
	s.state.Store(&sourceState{changed: make(chan struct{})})
	return s
}

func (s *Source) replace(f func(*sourceState)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	old := s.state.Load()
	next := &sourceState{svid: old.svid, bundles: old.bundles, fault: old.fault, changed: make(chan struct{})}
	f(next)
	next.suffer(old)
	s.state.Store(next)
	close(old.changed)
}

// SetSVID replaces the X509-SVID. The caller must not change it afterwards.
func (s *Source) SetSVID(svid *x509svid.SVID) { s.replace(func(n *sourceState) { n.svid = svid }) }

// SetBundles replaces all bundles at once. A trust domain that is missing here is no longer trusted.
func (s *Source) SetBundles(bundles map[spiffeid.TrustDomain]*spiffebundle.Bundle) {
	c := make(map[spiffeid.TrustDomain]*spiffebundle.Bundle, len(bundles))
	for td, b := range bundles {
		c[td] = b.Clone()
	}
	s.replace(func(n *sourceState) { n.bundles = c })
}

// Set replaces the X509-SVID and all bundles at once.
func (s *Source) Set(svid *x509svid.SVID, bundles map[spiffeid.TrustDomain]*spiffebundle.Bundle) {
	c := make(map[spiffeid.TrustDomain]*spiffebundle.Bundle, len(bundles))
	for td, b := range bundles {
		c[td] = b.Clone()
	}
	s.replace(func(n *sourceState) { n.svid, n.bundles = svid, c })
}

// GetX509SVID returns the current X509-SVID, or ErrNoSVID.
func (s *Source) GetX509SVID() (*x509svid.SVID, error) {
	if svid := s.state.Load().svid; svid != nil {
		return svid, nil
	}
	return nil, ErrNoSVID
}

// GetX509BundleForTrustDomain returns the X.509 authorities of td, or an error that names it.
func (s *Source) GetX509BundleForTrustDomain(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	b, ok := s.state.Load().verify[td]
	if !ok {
		return nil, fmt.Errorf("no bundle for trust domain %s: it is not federated with this one", td)
	}
	return b.X509Bundle(), nil
}

// Bundles returns every bundle. The bundles must not be changed.
func (s *Source) Bundles() map[spiffeid.TrustDomain]*spiffebundle.Bundle {
	return maps.Clone(s.state.Load().bundles)
}

// Changed returns a channel that is closed at the next change. Take it before reading.
func (s *Source) Changed() <-chan struct{} { return s.state.Load().changed }

// Wait blocks until there is an X509-SVID.
func (s *Source) Wait(ctx context.Context) error {
	for {
		changed := s.Changed()
		if _, err := s.GetX509SVID(); err == nil {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fmt.Errorf("wait for an X509-SVID: %w", ctx.Err())
		}
	}
}

// Verify checks a peer's chain (leaf first) against the bundle of its own trust domain and returns its SPIFFE ID
// (X509-SVID §5). The error names the ID and trust domain where they could be read.
func (s *Source) Verify(chain []*x509.Certificate) (spiffeid.ID, error) {
	return Verify(chain, s, time.Now())
}
