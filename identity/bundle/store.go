package bundle

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hanse-mesh/hanse/identity"
	"github.com/hanse-mesh/hanse/identity/atomicfile"
)

// Why a Store refuses a bundle.
var (
	ErrStale       = errors.New("an older bundle than the one in force")
	ErrTrustDomain = errors.New("the bundle of another trust domain")
	ErrEmpty       = errors.New("no X.509 authority in the bundle")
	ErrUnrelated   = errors.New("no relation with this trust domain")
	ErrShrinks     = errors.New("authorities that have not expired are gone, and nothing vouches for that")
)

// Config of a Store.
type Config struct {
	Dir         string // mode 0700; empty: in memory only
	TrustDomain spiffeid.TrustDomain
	Now         func() time.Time // default time.Now
	Log         *slog.Logger
	Registerer  prometheus.Registerer // may be nil
}

// Profile is how a bundle endpoint is authenticated (SPIFFE Federation §5.2).
type Profile string

// The profiles.
const (
	HTTPSWeb    Profile = "https_web"
	HTTPSSPIFFE Profile = "https_spiffe"
)

// Relation says that a trust domain is federated with ours, and where its bundle is pulled from.
type Relation struct {
	TrustDomain spiffeid.TrustDomain
	URL         string      // of its bundle endpoint; empty: the bundle comes by another way
	Profile     Profile     // with URL
	EndpointID  spiffeid.ID // who must answer, with HTTPSSPIFFE
	WebRoots    string      // PEM: who vouches for the endpoint, and nobody else does, with HTTPSWeb; empty: PullerConfig.WebRoots
}

func (r Relation) validate() error {
	if r.URL == "" {
		return nil
	}
	if !strings.HasPrefix(r.URL, "https://") {
		return fmt.Errorf("bundle endpoint %q: must begin with https://", r.URL)
	}
	switch {
	case r.WebRoots != "" && r.Profile != HTTPSWeb:
		return errors.New("roots of the web have a meaning only with the profile https_web")
	case r.WebRoots != "" && !x509.NewCertPool().AppendCertsFromPEM([]byte(r.WebRoots)):
		return errors.New("the roots of the web hold no certificate in PEM")
	case r.Profile == HTTPSWeb:
	case r.Profile == HTTPSSPIFFE && !r.EndpointID.IsZero():
	case r.Profile == HTTPSSPIFFE:
		return errors.New("profile https_spiffe needs the endpoint's SPIFFE ID")
	default:
		return fmt.Errorf("unknown profile %q", r.Profile)
	}
	return nil
}

// Store holds bundles by trust domain. It is safe for concurrent use.
type Store struct {
	// read-only after Open
	cfg     Config
	log     *slog.Logger
	refused *prometheus.CounterVec

	state atomic.Pointer[state]
	mu    sync.Mutex // serialises writers of state

	polled atomic.Int64 // Unix nanoseconds; see Polled

	refusedMu sync.Mutex
	refusals  map[spiffeid.TrustDomain]Refusal // guarded by refusedMu
}

// state is immutable once stored.
type state struct {
	bundles    map[spiffeid.TrustDomain]*spiffebundle.Bundle // as they came; never changed once here
	relations  map[spiffeid.TrustDomain]Relation
	distrusted []Distrust
	revision   int64 // grows with each change of relations and of what is distrusted; persisted
	changed    chan struct{}

	inForce map[spiffeid.TrustDomain]*spiffebundle.Bundle // bundles without what is distrusted
}

// Open loads the bundles and relations in cfg.Dir. A bundle that does not decode is logged and absent until it is set
// again; relations that do not decode are an error, since nobody would set them again.
func Open(cfg Config) (*Store, error) {
	if cfg.TrustDomain.IsZero() {
		return nil, errors.New("open bundle store: no trust domain")
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	s := &Store{cfg: cfg, log: cfg.Log, refusals: map[spiffeid.TrustDomain]Refusal{}, refused: prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "hanse_bundle_refused_total", Help: "Bundles that were refused, by trust domain and reason (backwards, shrinks, trust_domain, empty, unrelated, other)."},
		[]string{"trust_domain", "reason"})}
	if cfg.Registerer != nil {
		if err := cfg.Registerer.Register(s.refused); err != nil {
			return nil, fmt.Errorf("open bundle store: register metrics: %w", err)
		}
	}
	st := &state{bundles: map[spiffeid.TrustDomain]*spiffebundle.Bundle{}, relations: map[spiffeid.TrustDomain]Relation{}, changed: make(chan struct{})}
	s.state.Store(st)
	if cfg.Dir == "" {
		return s, nil
	}
	if err := atomicfile.MakeDir(cfg.Dir); err != nil {
		return nil, fmt.Errorf("open bundle store: %w", err)
	}
	if err := s.loadRelations(st); err != nil {
		return nil, fmt.Errorf("open bundle store: %w", err)
	}
	for td := range st.relations {
		s.loadBundle(st, td)
	}
	s.loadBundle(st, cfg.TrustDomain)
	st.apply()
	return s, nil
}

func (s *Store) bundlePath(td spiffeid.TrustDomain) string {
	return filepath.Join(s.cfg.Dir, td.Name()+".bundle.json")
}

func (s *Store) relationsPath() string { return filepath.Join(s.cfg.Dir, "relations.json") }

func (s *Store) loadBundle(st *state, td spiffeid.TrustDomain) {
	data, err := atomicfile.Read(s.bundlePath(td), MaxSize)
	if errors.Is(err, fs.ErrNotExist) {
		return
	}
	var b *spiffebundle.Bundle
	if err == nil {
		b, err = Parse(td, data)
	}
	if err != nil {
		s.log.Error("bundle on disk does not load; its trust domain is not trusted until it is received again",
			"trust_domain", td.Name(), "file", s.bundlePath(td), "error", err)
		return
	}
	st.bundles[td] = b
}

type fileRelations struct {
	Revision   int64          `json:"revision"`
	Relations  []fileRelation `json:"relations"`
	Distrusted []Distrust     `json:"distrusted,omitempty"`
}

type fileRelation struct {
	TrustDomain string  `json:"trust_domain"`
	URL         string  `json:"url,omitempty"`
	Profile     Profile `json:"profile,omitempty"`
	EndpointID  string  `json:"endpoint_id,omitempty"`
	WebRoots    string  `json:"web_roots,omitempty"`
}

func (s *Store) loadRelations(st *state) error {
	path := s.relationsPath()
	data, err := atomicfile.Read(path, MaxSize)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var f fileRelations
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&f); err != nil {
		return fmt.Errorf("%s is damaged, and is left as it is: %w", path, err)
	}
	st.revision, st.distrusted = f.Revision, f.Distrusted
	for _, fr := range f.Relations {
		r := Relation{URL: fr.URL, Profile: fr.Profile, WebRoots: fr.WebRoots}
		if r.TrustDomain, err = spiffeid.TrustDomainFromString(fr.TrustDomain); err != nil {
			return fmt.Errorf("%s is damaged, and is left as it is: %w", path, err)
		}
		if fr.EndpointID != "" {
			if r.EndpointID, err = spiffeid.FromString(fr.EndpointID); err != nil {
				return fmt.Errorf("%s is damaged, and is left as it is: %w", path, err)
			}
		}
		st.relations[r.TrustDomain] = r
	}
	return nil
}

func (s *Store) storeRelations(st *state) error {
	if s.cfg.Dir == "" {
		return nil
	}
	f := fileRelations{Revision: st.revision, Relations: []fileRelation{}, Distrusted: st.distrusted}
	for _, r := range sorted(st.relations) {
		fr := fileRelation{TrustDomain: r.TrustDomain.Name(), URL: r.URL, Profile: r.Profile, WebRoots: r.WebRoots}
		if !r.EndpointID.IsZero() {
			fr.EndpointID = r.EndpointID.String()
		}
		f.Relations = append(f.Relations, fr)
	}
	data, err := json.MarshalIndent(f, "", "  ")
	if err != nil {
		return fmt.Errorf("encode relations: %w", err)
	}
	return atomicfile.Write(s.relationsPath(), data)
}

func sorted(m map[spiffeid.TrustDomain]Relation) []Relation {
	return slices.SortedFunc(maps.Values(m), func(a, b Relation) int {
		return strings.Compare(a.TrustDomain.Name(), b.TrustDomain.Name())
	})
}

// change stores what f makes of a copy of the state. f persists before it returns true; false means that nothing changed.
func (s *Store) change(f func(next *state) (bool, error)) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	cur := s.state.Load()
	next := &state{bundles: maps.Clone(cur.bundles), relations: maps.Clone(cur.relations), distrusted: cur.distrusted,
		revision: cur.revision, changed: make(chan struct{})}
	ok, err := f(next)
	if err != nil || !ok {
		return err
	}
	next.apply()
	s.state.Store(next)
	close(cur.changed)
	return nil
}

// Set takes the bundle of td, if it is newer than the one in force. The same bundle again is no error. A bundle without
// a sequence number (it is optional) counts as newer, and is given the next number, so that readers see a change.
// source says in the log where it came from. Errors: ErrStale, ErrTrustDomain, ErrEmpty, ErrUnrelated, ErrShrinks.
//
// Authorities that have not expired may go only with a newer sequence that was given by the authority itself, and never all at
// once: whoever hands over a bundle was verified by the one in force (https_spiffe, federation), and an authority that no
// longer vouches for its own messenger is not believed.
func (s *Store) Set(td spiffeid.TrustDomain, b *spiffebundle.Bundle, source string) error {
	return s.set(td, b, source, believed)
}

// SetVouched is Set for what came from one who is verified by other means than the bundle in force, such as the web's
// authorities: with a newer sequence such a bundle may replace all authorities at once.
func (s *Store) SetVouched(td spiffeid.TrustDomain, b *spiffebundle.Bundle, source string) error {
	return s.set(td, b, source, vouched)
}

// Replace is Set by an administrator: whatever the sequence, this bundle is now in force.
func (s *Store) Replace(td spiffeid.TrustDomain, b *spiffebundle.Bundle, source string) error {
	return s.set(td, b, source, forced)
}

// standing is what speaks for a bundle.
type standing int

const (
	believed standing = iota // the bundle in force verified who brought it
	vouched                  // something else did
	forced                   // a person
)

func (s *Store) set(td spiffeid.TrustDomain, b *spiffebundle.Bundle, source string, by standing) error {
	fail := func(err error) error {
		s.note(td, b, source, err)
		return fmt.Errorf("bundle of %s from %s: %w", td, source, err)
	}
	force := by == forced
	switch {
	case b.TrustDomain() != td:
		return fail(fmt.Errorf("%w: %s", ErrTrustDomain, b.TrustDomain()))
	case len(b.X509Authorities()) == 0:
		return fail(ErrEmpty)
	}
	b = b.Clone()
	err := s.change(func(n *state) (bool, error) {
		if _, ok := n.relations[td]; !ok && td != s.cfg.TrustDomain {
			return false, ErrUnrelated
		}
		cur := n.bundles[td]
		if cur != nil && sameAuthorities(cur, b) && sameOrNoSequence(cur, b) && (!force || sameHint(cur, b)) {
			return false, nil
		}
		if cur != nil && td != s.cfg.TrustDomain && !force {
			if err := shrinks(cur, b, by, s.cfg.Now()); err != nil {
				return false, err
			}
		}
		if err := orderSequence(cur, b, force); err != nil {
			return false, err
		}
		if s.cfg.Dir != "" {
			data, err := b.Marshal()
			if err != nil {
				return false, err
			}
			if err := atomicfile.Write(s.bundlePath(td), data); err != nil {
				return false, err
			}
		}
		n.bundles[td] = b
		return true, nil
	})
	if err != nil {
		return fail(err)
	}
	s.forgive(td, source)
	return nil
}

func sameAuthorities(a, b *spiffebundle.Bundle) bool {
	return a.X509Bundle().Equal(b.X509Bundle()) && a.JWTBundle().Equal(b.JWTBundle())
}

func sameOrNoSequence(cur, b *spiffebundle.Bundle) bool {
	have, _ := cur.SequenceNumber()
	got, ok := b.SequenceNumber()
	return !ok || have == got
}

func sameHint(a, b *spiffebundle.Bundle) bool {
	x, _ := a.RefreshHint()
	y, _ := b.RefreshHint()
	return x == y
}

// orderSequence refuses an older bundle, and numbers one that has no sequence of its own. cur may be nil.
func orderSequence(cur, b *spiffebundle.Bundle, force bool) error {
	var have uint64
	if cur != nil {
		have, _ = cur.SequenceNumber()
	}
	got, ok := b.SequenceNumber()
	switch {
	case !ok, force && got <= have:
		b.SetSequenceNumber(have + 1)
	case cur != nil && got < have:
		return fmt.Errorf("%w: sequence %d after %d", ErrStale, got, have)
	case cur != nil && got == have:
		return fmt.Errorf("%w: another content under the same sequence %d", ErrStale, got)
	}
	return nil
}

// Relate adds or replaces a relation. It may exist before its bundle.
func (s *Store) Relate(r Relation) error {
	if r.TrustDomain.IsZero() || r.TrustDomain == s.cfg.TrustDomain {
		return fmt.Errorf("relate with %q: %w", r.TrustDomain, ErrTrustDomain)
	}
	if err := r.validate(); err != nil {
		return fmt.Errorf("relate with %s: %w", r.TrustDomain, err)
	}
	err := s.change(func(n *state) (bool, error) {
		if cur, ok := n.relations[r.TrustDomain]; ok && cur == r {
			return false, nil
		}
		n.relations[r.TrustDomain] = r
		n.revision++
		return true, s.storeRelations(n)
	})
	if err != nil {
		return fmt.Errorf("relate with %s: %w", r.TrustDomain, err)
	}
	return nil
}

// Unrelate ends a relation and removes its bundle: the trust domain is not trusted any more.
func (s *Store) Unrelate(td spiffeid.TrustDomain) error {
	err := s.change(func(n *state) (bool, error) {
		if _, ok := n.relations[td]; !ok {
			return false, nil
		}
		delete(n.relations, td)
		delete(n.bundles, td)
		n.revision++
		if err := s.storeRelations(n); err != nil {
			return false, err
		}
		return true, s.removeFile(td)
	})
	if err != nil {
		return fmt.Errorf("end relation with %s: %w", td, err)
	}
	return nil
}

// Remove removes the bundle of td and keeps the relation, which waits for another.
func (s *Store) Remove(td spiffeid.TrustDomain) error {
	err := s.change(func(n *state) (bool, error) {
		if _, ok := n.bundles[td]; !ok {
			return false, nil
		}
		delete(n.bundles, td)
		return true, s.removeFile(td)
	})
	if err != nil {
		return fmt.Errorf("remove bundle of %s: %w", td, err)
	}
	return nil
}

func (s *Store) removeFile(td spiffeid.TrustDomain) error {
	if s.cfg.Dir == "" {
		return nil
	}
	if err := os.Remove(s.bundlePath(td)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return atomicfile.SyncDir(s.cfg.Dir)
}

// Get returns a copy of the bundle of td, without what is distrusted.
func (s *Store) Get(td spiffeid.TrustDomain) (*spiffebundle.Bundle, bool) {
	b, ok := s.state.Load().inForce[td]
	if !ok {
		return nil, false
	}
	return b.Clone(), true
}

// All returns every bundle, the own one too, without what is distrusted. They must not be changed.
func (s *Store) All() map[spiffeid.TrustDomain]*spiffebundle.Bundle {
	return maps.Clone(s.state.Load().inForce)
}

// Sequences returns the sequence of every bundle.
func (s *Store) Sequences() map[spiffeid.TrustDomain]uint64 {
	out := map[spiffeid.TrustDomain]uint64{}
	for td, b := range s.state.Load().inForce {
		out[td], _ = b.SequenceNumber()
	}
	return out
}

// Relations returns every relation, by trust domain.
func (s *Store) Relations() []Relation { return sorted(s.state.Load().relations) }

// Related reports the relation with td.
func (s *Store) Related(td spiffeid.TrustDomain) (Relation, bool) {
	r, ok := s.state.Load().relations[td]
	return r, ok
}

// Revision grows with each change of the relations and of what is distrusted, over restarts too.
func (s *Store) Revision() int64 { return s.state.Load().revision }

// Changed returns a channel that is closed at the next change. Take it before reading.
func (s *Store) Changed() <-chan struct{} { return s.state.Load().changed }

// GetX509BundleForTrustDomain makes a Store a bundle source of go-spiffe.
func (s *Store) GetX509BundleForTrustDomain(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	b, ok := s.state.Load().inForce[td]
	if !ok {
		return nil, fmt.Errorf("no bundle for trust domain %s: it is not federated with this one", td)
	}
	return b.X509Bundle(), nil
}

// RunSource copies every bundle into src at each change, until ctx ends.
func (s *Store) RunSource(ctx context.Context, src *identity.Source) error {
	for {
		changed := s.Changed()
		src.SetBundles(s.All())
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		}
	}
}
