package agent

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"path/filepath"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/hanse-mesh/hanse/identity/atomicfile"
)

// credential is a key and what was signed for it. It is immutable.
type credential struct {
	key     *ecdsa.PrivateKey
	id      spiffeid.ID
	chain   []*x509.Certificate // empty: not signed yet
	renewAt time.Time
}

// LogValue hides the key.
func (c *credential) LogValue() slog.Value { return slog.StringValue(c.id.String()) }

func (c *credential) valid(now time.Time) bool {
	return c != nil && len(c.chain) > 0 && now.Before(c.chain[0].NotAfter)
}

// state is what an agent knows, and what it keeps on disk.
type state struct {
	agent     *credential // nil: never attested
	svid      *credential // nil: none yet
	entryID   string      // of svid
	revision  int64       // of that entry
	federates []string    // trust domains that it federates with, as last heard; not kept
	bundles   map[spiffeid.TrustDomain]*spiffebundle.Bundle
}

// due is how long until there is something to do.
func (s *state) due(now time.Time, sync time.Duration) time.Duration {
	wait := sync
	for _, c := range []*credential{s.agent, s.svid} {
		if c.valid(now) {
			wait = min(wait, c.renewAt.Sub(now))
		}
	}
	return max(wait, 20*time.Millisecond)
}

func (a *Agent) newKey() (*ecdsa.PrivateKey, error) {
	key, err := ecdsa.GenerateKey(a.cfg.Curve, rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make key: %w", err)
	}
	return key, nil
}

// The file agent.json. Version 1.
type fileState struct {
	Version     int                        `json:"version"`
	TrustDomain string                     `json:"trust_domain"`
	Agent       *fileCredential            `json:"agent,omitempty"`
	SVID        *fileCredential            `json:"svid,omitempty"`
	EntryID     string                     `json:"entry_id,omitempty"`
	Revision    int64                      `json:"revision,omitempty"`
	Bundles     map[string]json.RawMessage `json:"bundles,omitempty"` // SPIFFE bundles by trust domain
}

type fileCredential struct {
	Key     []byte    `json:"key"`   // PKCS#8
	Chain   [][]byte  `json:"chain"` // DER, leaf first
	RenewAt time.Time `json:"renew_at"`
}

const maxStateFile = 64 << 20 // a thousand bundles

func (a *Agent) statePath() string { return filepath.Join(a.cfg.StateDir, "agent.json") }

// loadState reads the state and, if its SVID is valid still, serves it. A file that does not decode is an error that
// names it; it is never overwritten.
func (a *Agent) loadState() error {
	if err := atomicfile.MakeDir(a.cfg.StateDir); err != nil {
		return err
	}
	data, err := atomicfile.Read(a.statePath(), maxStateFile)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := a.state.decode(data, a.cfg.TrustDomain); err != nil {
		return fmt.Errorf("%s is damaged or not ours, and is left as it is; move it away to attest anew with another token: %w", a.statePath(), err)
	}
	if a.state.svid.valid(a.cfg.Now()) {
		a.publish()
		a.log.Info("identity loaded from disk", "id", a.state.svid.id.String(), "expires", a.state.svid.chain[0].NotAfter)
	}
	return nil
}

func (s *state) decode(data []byte, td spiffeid.TrustDomain) error {
	var f fileState
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&f); err != nil {
		return err
	}
	switch {
	case f.Version != 1:
		return fmt.Errorf("version %d, want 1", f.Version)
	case f.TrustDomain != td.Name():
		return fmt.Errorf("it is of trust domain %q, not of %q", f.TrustDomain, td.Name())
	}
	var err error
	if s.agent, err = f.Agent.decode(); err != nil {
		return fmt.Errorf("agent: %w", err)
	}
	if s.svid, err = f.SVID.decode(); err != nil {
		return fmt.Errorf("svid: %w", err)
	}
	s.entryID, s.revision = f.EntryID, f.Revision
	s.bundles = map[spiffeid.TrustDomain]*spiffebundle.Bundle{}
	for name, raw := range f.Bundles {
		td, err := spiffeid.TrustDomainFromString(name)
		if err != nil {
			return fmt.Errorf("bundle of %q: %w", name, err)
		}
		if s.bundles[td], err = spiffebundle.Parse(td, raw); err != nil {
			return fmt.Errorf("bundle of %s: %w", name, err)
		}
	}
	return nil
}

func (f *fileCredential) decode() (*credential, error) {
	if f == nil {
		return nil, nil
	}
	k, err := x509.ParsePKCS8PrivateKey(f.Key)
	if err != nil {
		return nil, err
	}
	c := &credential{renewAt: f.RenewAt}
	var ok bool
	if c.key, ok = k.(*ecdsa.PrivateKey); !ok {
		return nil, fmt.Errorf("key is a %T, want an elliptic curve key", k)
	}
	for _, der := range f.Chain {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, err
		}
		c.chain = append(c.chain, cert)
	}
	if len(c.chain) == 0 {
		return c, nil
	}
	if !c.key.PublicKey.Equal(c.chain[0].PublicKey) {
		return nil, errors.New("the key does not belong to the certificate")
	}
	c.id, err = x509svid.IDFromCert(c.chain[0])
	return c, err
}

// keep writes the state to disk.
func (a *Agent) keep() error {
	f := fileState{Version: 1, TrustDomain: a.cfg.TrustDomain.Name(), EntryID: a.state.entryID, Revision: a.state.revision}
	var err error
	if f.Agent, err = a.state.agent.encode(); err != nil {
		return fmt.Errorf("keep identity: %w", err)
	}
	if f.SVID, err = a.state.svid.encode(); err != nil {
		return fmt.Errorf("keep identity: %w", err)
	}
	if len(a.state.bundles) > 0 {
		f.Bundles = map[string]json.RawMessage{}
	}
	for td, b := range a.state.bundles {
		if f.Bundles[td.Name()], err = b.Marshal(); err != nil {
			return fmt.Errorf("keep bundle of %s: %w", td, err)
		}
	}
	data, err := json.Marshal(f)
	if err != nil {
		return fmt.Errorf("keep identity: %w", err)
	}
	return atomicfile.Write(a.statePath(), data)
}

func (c *credential) encode() (*fileCredential, error) {
	if c == nil {
		return nil, nil
	}
	key, err := x509.MarshalPKCS8PrivateKey(c.key)
	if err != nil {
		return nil, err
	}
	f := &fileCredential{Key: key, RenewAt: c.renewAt}
	for _, cert := range c.chain {
		f.Chain = append(f.Chain, cert.Raw)
	}
	return f, nil
}

// publish puts SVID and bundles into the Source at once.
func (a *Agent) publish() {
	a.src.Set(&x509svid.SVID{ID: a.state.svid.id, Certificates: a.state.svid.chain, PrivateKey: a.state.svid.key}, a.state.bundles)
}
