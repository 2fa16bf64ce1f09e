package ca

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math/big"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/cryptosigner"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/hanse-mesh/hanse/identity"
	"github.com/hanse-mesh/hanse/identity/atomicfile"
)

// Errors to branch on.
var (
	// ErrNotActive is returned by the signing methods of a replica whose first root is not acknowledged yet.
	ErrNotActive = errors.New("this replica's root is not active yet")
	// ErrExpired is returned by the signing methods when the active root has expired and Run has not replaced it.
	ErrExpired = errors.New("the active root has expired")
	// ErrClock is returned by Open when a root on disk begins in the future.
	ErrClock = errors.New("the clock is before the root's validity")
)

// backdate is how far NotBefore lies in the past, for verifiers whose clocks are behind.
const backdate = 15 * time.Minute

// Config of an Authority. Dir and TrustDomain are required.
type Config struct {
	Dir         string // mode 0700; holds authority.json, mode 0600
	TrustDomain spiffeid.TrustDomain
	Replica     string // named in the subject of the roots, for people

	// Curve of the keys that sign, P-256 (default) or P-384; another one than that of the active root is a rotation.
	Curve elliptic.Curve
	// Memory keeps everything in memory: nothing is written, and what Dir still holds is loaded once and removed. After a restart there are other
	// keys, so that it needs an Upstream, below whose root they are good at once.
	Memory bool

	RootLife time.Duration // default 7 days
	X509Life time.Duration // default 1 h: an X509-SVID's life when its TTL is 0
	JWTLife  time.Duration // default 5 min

	// Join is set for a replica that is added to a running cluster: its first root waits to be acknowledged too.
	Join bool
	// Upstream signs this authority's CAs; its roots are then the trust domain's. Nil: this authority makes its own.
	Upstream Upstream
	// Peers sign while this replica may not. May be nil.
	Peers Peers
	// Until is until when the others know that this replica signs: nothing that it signs ends later. Nil: there are no others.
	Until func() time.Time
	// Acked says whether everybody who must has loaded the bundle of that sequence, or who is missing. It is polled by
	// Run while a root is prepared. Without it Run waits until a quarter of the old root's life remains.
	Acked func(sequence uint64) (ok bool, missing []string)

	Now        func() time.Time // default time.Now
	Log        *slog.Logger
	Registerer prometheus.Registerer // may be nil
}

// Authority signs for one trust domain. It is safe for concurrent use.
type Authority struct {
	// read-only after Open
	cfg     Config
	log     *slog.Logger
	path    string
	metrics *metrics
	wake    chan struct{} // size 1; makes Run look

	state atomic.Pointer[state]
	mu    sync.Mutex // serialises writers of state
}

// Open loads the authority in cfg.Dir, or makes a first one in an empty folder. A file that does not decode is an error
// that names it; it is never overwritten. An expired root is replaced by a fresh one.
func Open(cfg Config) (*Authority, error) {
	if cfg.TrustDomain.IsZero() {
		return nil, errors.New("open authority: no trust domain")
	}
	setDefault(&cfg.RootLife, 7*24*time.Hour)
	setDefault(&cfg.X509Life, time.Hour)
	setDefault(&cfg.JWTLife, 5*time.Minute)
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Curve == nil {
		cfg.Curve = elliptic.P256()
	}
	if cfg.Memory && cfg.Upstream == nil {
		return nil, errors.New("open authority: keys in memory need an upstream: without one nobody would know those of the next start")
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if err := atomicfile.MakeDir(cfg.Dir); err != nil {
		return nil, fmt.Errorf("open authority of %s: %w", cfg.TrustDomain, err)
	}
	a := &Authority{cfg: cfg, log: cfg.Log.With("trust_domain", cfg.TrustDomain.Name()), path: filepath.Join(cfg.Dir, "authority.json"),
		wake: make(chan struct{}, 1)}
	st, err := load(a.path, cfg.TrustDomain)
	if err != nil {
		return nil, fmt.Errorf("open authority of %s: %w", cfg.TrustDomain, err)
	}
	a.state.Store(st)
	if err := a.start(cfg.Now()); err != nil {
		return nil, fmt.Errorf("open authority of %s: %w", cfg.TrustDomain, err)
	}
	if cfg.Memory {
		if err := os.Remove(a.path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("open authority of %s: keys are to be in memory only: %w", cfg.TrustDomain, err)
		}
	}
	if a.metrics, err = newMetrics(cfg.Registerer, a); err != nil {
		return nil, fmt.Errorf("open authority of %s: %w", cfg.TrustDomain, err)
	}
	return a, nil
}

func setDefault(d *time.Duration, value time.Duration) {
	if *d <= 0 {
		*d = value
	}
}

// start checks the loaded roots against the clock and sees to it that there is one to go on with.
func (a *Authority) start(now time.Time) error {
	first := len(a.state.Load().roots) == 0
	for _, r := range a.state.Load().roots {
		if now.Before(r.cert.NotBefore) {
			return fmt.Errorf("%w: %s holds a root that is valid from %s, and it is %s; correct the clock",
				ErrClock, a.path, r.cert.NotBefore.UTC().Format(time.RFC3339), now.UTC().Format(time.RFC3339))
		}
	}
	if r := a.state.Load().with(active); r != nil {
		// What was signed just before a crash may not have been noted.
		a.reserve(r, now.Add(a.cfg.X509Life))
	}
	if err := a.DropOld(); err != nil {
		return err
	}
	if first && a.cfg.Join {
		return a.Prepare()
	}
	if r := a.state.Load().with(active); r != nil && a.cfg.Join && !now.Before(r.cert.NotAfter) {
		return a.Rejoin()
	}
	return a.replaceExpired(now, first)
}

// replaceExpired makes sure that the active root, if there must be one, is valid.
func (a *Authority) replaceExpired(now time.Time, first bool) error {
	st := a.state.Load()
	act, next := st.with(active), st.with(prepared)
	if act != nil && now.Before(act.cert.NotAfter) || act == nil && next != nil && now.Before(next.cert.NotAfter) {
		return nil
	}
	if act == nil && !first && a.cfg.Peers != nil { // the one that was prepared was withdrawn; others sign meanwhile
		return a.Prepare()
	}
	if !first {
		a.log.Error("root expired, a fresh one signs at once; whoever does not know it refuses its SVIDs", "known_successor", next != nil)
	}
	if next == nil || !now.Before(next.cert.NotAfter) {
		if err := a.Prepare(); err != nil {
			return err
		}
	}
	return errors.Join(a.Activate(), a.DropOld())
}

// Sequence is that of the current bundle. It grows with each change of the roots, and is never less than the Unix time
// of that change, so that an authority made anew or restored from a backup is newer than what it was.
func (a *Authority) Sequence() uint64 { return a.state.Load().sequence }

// TrustDomain is the one that this authority signs for.
func (a *Authority) TrustDomain() spiffeid.TrustDomain { return a.cfg.TrustDomain }

// Bundle returns the X.509 and JWT authorities of this replica: active, prepared and old (SPIFFE Trust Domain and
// Bundle §4). The caller owns it.
func (a *Authority) Bundle() *spiffebundle.Bundle { return a.state.Load().bundle(a.cfg) }

// Changed returns a channel that is closed at the next change of the roots. Take it before reading.
func (a *Authority) Changed() <-chan struct{} { return a.state.Load().changed }

// X509Params says what to sign.
type X509Params struct {
	ID        spiffeid.ID
	PublicKey crypto.PublicKey
	TTL       time.Duration // 0: Config.X509Life; never beyond the life of the root
	DNSNames  []string
}

// SignX509 returns an X509-SVID, leaf first (X509-SVID §2 to §4). ID must be a member of the trust domain with a path.
func (a *Authority) SignX509(ctx context.Context, p X509Params) ([]*x509.Certificate, error) {
	if err := a.checkID(p.ID); err != nil {
		return nil, fmt.Errorf("sign X509-SVID: %w", err)
	}
	now := a.cfg.Now()
	r, notAfter, err := a.issuer(now, p.TTL, a.cfg.X509Life)
	if err != nil {
		chain, err := byPeers(ctx, a, err, func(ctx context.Context, peers Peers) ([]*x509.Certificate, error) { return peers.SignX509(ctx, p) })
		if err != nil {
			return nil, fmt.Errorf("sign X509-SVID %s: %w", p.ID, err)
		}
		return chain, nil
	}
	serial, err := newSerial()
	if err != nil {
		return nil, fmt.Errorf("sign X509-SVID %s: %w", p.ID, err)
	}
	notBefore := now.Add(-backdate)
	if notBefore.Before(r.cert.NotBefore) {
		notBefore = r.cert.NotBefore
	}
	der, err := r.sign(leaf{serial: serial, notBefore: notBefore, notAfter: notAfter, key: p.PublicKey, uri: p.ID.String(), dnsNames: p.DNSNames})
	if err != nil {
		return nil, fmt.Errorf("sign X509-SVID %s: %w", p.ID, err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("sign X509-SVID %s: %w", p.ID, err)
	}
	a.metrics.signed.WithLabelValues("x509").Inc()
	return append([]*x509.Certificate{cert}, r.below()...), nil
}

// SignDownstream signs an intermediate CA of this trust domain (X509-SVID §4): whoever holds its key signs for every ID of
// it. ttl 0 is a day; nothing outlives the root. The chain is the CA first; the bundle's authorities verify it.
func (a *Authority) SignDownstream(_ context.Context, key crypto.PublicKey, ttl time.Duration) ([]*x509.Certificate, error) {
	now := a.cfg.Now()
	r, notAfter, err := a.issuer(now, ttl, min(24*time.Hour, a.cfg.RootLife))
	if err != nil {
		return nil, fmt.Errorf("sign downstream CA of %s: %w", a.cfg.TrustDomain, err)
	}
	template, err := caTemplate(a.cfg, now, notAfter)
	if err != nil {
		return nil, err
	}
	template.Subject.OrganizationalUnit = []string{"DOWNSTREAM"}
	if template.NotBefore.Before(r.cert.NotBefore) {
		template.NotBefore = r.cert.NotBefore
	}
	der, err := x509.CreateCertificate(rand.Reader, template, r.cert, key, r.key)
	if err != nil {
		return nil, fmt.Errorf("sign downstream CA of %s: %w", a.cfg.TrustDomain, err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("sign downstream CA of %s: %w", a.cfg.TrustDomain, err)
	}
	a.metrics.signed.WithLabelValues("ca").Inc()
	return append([]*x509.Certificate{cert}, r.below()...), nil
}

// NewSVID makes a key on the curve of the configuration and signs an X509-SVID for it, for this replica's own use.
func (a *Authority) NewSVID(id spiffeid.ID, ttl time.Duration) (*x509svid.SVID, error) {
	return a.newSVID(context.Background(), id, ttl)
}

func (a *Authority) newSVID(ctx context.Context, id spiffeid.ID, ttl time.Duration) (*x509svid.SVID, error) {
	key, err := ecdsa.GenerateKey(a.cfg.Curve, rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make key of %s: %w", id, err)
	}
	chain, err := a.SignX509(ctx, X509Params{ID: id, PublicKey: key.Public(), TTL: ttl})
	if err != nil {
		return nil, err
	}
	return &x509svid.SVID{ID: id, Certificates: chain, PrivateKey: key}, nil
}

// JWTSVID is a signed token and what it says.
type JWTSVID struct {
	Token             string
	ID                spiffeid.ID
	IssuedAt, Expires time.Time
}

// LogValue hides the token.
func (j JWTSVID) LogValue() slog.Value { return slog.StringValue(j.ID.String()) }

// SignJWT returns a JWT-SVID (JWT-SVID §2, §3). ttl 0 is Config.JWTLife. There must be an audience.
func (a *Authority) SignJWT(ctx context.Context, id spiffeid.ID, audience []string, ttl time.Duration) (JWTSVID, error) {
	if err := a.checkID(id); err != nil {
		return JWTSVID{}, fmt.Errorf("sign JWT-SVID: %w", err)
	}
	if len(audience) == 0 {
		return JWTSVID{}, fmt.Errorf("sign JWT-SVID %s: no audience", id)
	}
	now := a.cfg.Now()
	r, expires, err := a.issuer(now, ttl, a.cfg.JWTLife)
	if err != nil {
		j, err := byPeers(ctx, a, err, func(ctx context.Context, peers Peers) (JWTSVID, error) { return peers.SignJWT(ctx, id, audience, ttl) })
		if err != nil {
			return JWTSVID{}, fmt.Errorf("sign JWT-SVID %s: %w", id, err)
		}
		return j, nil
	}
	token, err := r.signJWT(jwt.Claims{Subject: id.String(), Audience: audience, IssuedAt: jwt.NewNumericDate(now), Expiry: jwt.NewNumericDate(expires)})
	if err != nil {
		return JWTSVID{}, fmt.Errorf("sign JWT-SVID %s: %w", id, err)
	}
	a.metrics.signed.WithLabelValues("jwt").Inc()
	return JWTSVID{Token: token, ID: id, IssuedAt: now.Truncate(time.Second), Expires: expires}, nil
}

func (r *root) signJWT(claims jwt.Claims) (string, error) {
	algorithm := jose.ES256
	if r.jwtKey.Curve == elliptic.P384() {
		algorithm = jose.ES384
	}
	signer, err := jose.NewSigner(jose.SigningKey{
		Algorithm: algorithm,
		Key:       jose.JSONWebKey{Key: cryptosigner.Opaque(checkedKey{r.jwtKey}), KeyID: r.kid},
	}, new(jose.SignerOptions).WithType("JWT"))
	if err != nil {
		return "", err
	}
	return jwt.Signed(signer).Claims(claims).Serialize()
}

func (a *Authority) checkID(id spiffeid.ID) error {
	switch {
	case !id.MemberOf(a.cfg.TrustDomain):
		return fmt.Errorf("%q is not of trust domain %s", id, a.cfg.TrustDomain)
	case id.Path() == "":
		return fmt.Errorf("%s names no workload", id)
	}
	return nil
}

// issuer returns the root to sign with and when what it signs has to end; the root stays in the bundle until then.
func (a *Authority) issuer(now time.Time, ttl, life time.Duration) (*root, time.Time, error) {
	if ttl <= 0 {
		ttl = life
	}
	r := a.state.Load().with(active)
	if r == nil {
		return nil, time.Time{}, ErrNotActive
	}
	end := now.Add(ttl)
	if end.After(r.cert.NotAfter) {
		end = r.cert.NotAfter
	}
	if a.cfg.Until != nil {
		until := a.cfg.Until()
		if end.After(until) {
			end = until
		}
		if !now.Add(time.Second).Before(end) {
			return nil, time.Time{}, fmt.Errorf("%w: the other replicas were told that it signs until %s", ErrNotActive, until.UTC().Format(time.RFC3339))
		}
	}
	end = end.Truncate(time.Second) // certificates and tokens have whole seconds
	if !end.After(now) {
		return nil, time.Time{}, fmt.Errorf("%w at %s", ErrExpired, r.cert.NotAfter.UTC().Format(time.RFC3339))
	}
	if end.After(r.signedUntil) {
		a.reserve(r, end.Add(a.cfg.X509Life))
	}
	return r, end, nil
}

// reserve notes that r signs until a time, ahead of need, so that the disk is written once per life and not per SVID.
// A full disk does not stop signing: the note is then kept in memory only.
func (a *Authority) reserve(r *root, until time.Time) {
	if until.After(r.cert.NotAfter) {
		until = r.cert.NotAfter
	}
	err := a.change(func(n *state) bool {
		for i, x := range n.roots {
			if x.cert.Equal(r.cert) && until.After(x.signedUntil) {
				c := *x
				c.signedUntil = until
				n.roots[i] = &c
			}
		}
		return false
	})
	if err != nil {
		a.log.Error("cannot note how long a root signs; kept in memory", "error", err)
	}
}

// RunSVID keeps an X509-SVID of id in src until ctx ends: renewed at half life, and when another root becomes active.
// The first one is there when RunSVID blocks; src's bundles are somebody else's.
func (a *Authority) RunSVID(ctx context.Context, id spiffeid.ID, ttl time.Duration, src *identity.Source) error {
	for {
		changed := a.Changed()
		wait := time.Second // after an error
		svid, err := a.newSVID(ctx, id, ttl)
		if err != nil && ctx.Err() == nil {
			a.log.Error("cannot renew own X509-SVID", "id", id.String(), "error", err)
		} else if err == nil {
			src.SetSVID(svid)
			wait = max(svid.Certificates[0].NotAfter.Sub(a.cfg.Now())/2, 50*time.Millisecond)
		}
		timer := time.NewTimer(wait)
		for again := true; again; {
			again = false
			select {
			case <-ctx.Done():
				timer.Stop()
				return nil
			case <-timer.C:
			case <-changed:
				// A root that was only prepared or dropped changes nothing for this SVID.
				if r := a.state.Load().with(active); err == nil && r != nil && issuedBy(svid.Certificates[0], r.cert) {
					changed, again = a.Changed(), true
				}
			}
		}
		timer.Stop()
	}
}

func issuedBy(leaf, issuer *x509.Certificate) bool {
	return string(leaf.AuthorityKeyId) == string(issuer.SubjectKeyId)
}

func newSerial() (*big.Int, error) {
	n, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, fmt.Errorf("make serial number: %w", err)
	}
	return n.Add(n, big.NewInt(1)), nil
}
