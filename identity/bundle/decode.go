package bundle

import (
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// MaxSize bounds an encoded bundle, in bytes.
const MaxSize = 1 << 20

// maxAuthorities bounds each kind of authority in one bundle. A cluster has a few per replica.
const maxAuthorities = 1000

// Read decodes a foreign SPIFFE bundle (SPIFFE Trust Domain and Bundle §4), at most MaxSize bytes of it. It is an
// error if the bundle holds something that is no authority.
func Read(td spiffeid.TrustDomain, r io.Reader) (*spiffebundle.Bundle, error) {
	data, err := io.ReadAll(io.LimitReader(r, MaxSize+1))
	if err != nil {
		return nil, fmt.Errorf("read bundle of %s: %w", td, err)
	}
	return Parse(td, data)
}

// Parse is Read for bytes.
func Parse(td spiffeid.TrustDomain, data []byte) (*spiffebundle.Bundle, error) {
	if len(data) > MaxSize {
		return nil, fmt.Errorf("bundle of %s: larger than %d bytes", td, MaxSize)
	}
	b, err := spiffebundle.Parse(td, data)
	if err != nil {
		return nil, fmt.Errorf("bundle of %s: %w", td, err)
	}
	if err := Check(b); err != nil {
		return nil, err
	}
	return b, nil
}

// Check says whether a bundle that came from elsewhere may be used: X.509 authorities that are CAs and of its own trust
// domain where they say so (X509-SVID §4), keys for JWTs, bounded numbers. It bounds a refresh hint to [1 s, 1 day].
func Check(b *spiffebundle.Bundle) error {
	td := b.TrustDomain()
	roots := b.X509Authorities()
	if len(roots) > maxAuthorities || len(b.JWTAuthorities()) > maxAuthorities {
		return fmt.Errorf("bundle of %s: more than %d authorities", td, maxAuthorities)
	}
	for _, c := range roots {
		if !c.IsCA {
			return fmt.Errorf("bundle of %s: certificate %s is not a CA's", td, c.Subject)
		}
		if len(c.URIs) > 0 && (len(c.URIs) > 1 || c.URIs[0].String() != td.IDString()) {
			return fmt.Errorf("bundle of %s: certificate %s is %v", td, c.Subject, c.URIs)
		}
	}
	for kid, key := range b.JWTAuthorities() {
		if key == nil {
			return fmt.Errorf("bundle of %s: %w", td, errors.New("JWT authority "+kid+" has no key"))
		}
	}
	if hint, ok := b.RefreshHint(); ok {
		b.SetRefreshHint(min(max(hint, time.Second), 24*time.Hour))
	}
	return nil
}
