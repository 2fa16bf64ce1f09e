package bundle_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/federation"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/test/bufconn"

	"github.com/hanse-mesh/hanse/identity"
	"github.com/hanse-mesh/hanse/identity/bundle"
	"github.com/hanse-mesh/hanse/identity/ca"
)

var (
	west = spiffeid.RequireTrustDomainFromString("west.demo")
	east = spiffeid.RequireTrustDomainFromString("east.demo")
)

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func open(t testing.TB, dir string) *bundle.Store {
	t.Helper()
	s, err := bundle.Open(bundle.Config{Dir: dir, TrustDomain: west})
	check(t, err)
	return s
}

func authority(t testing.TB, td spiffeid.TrustDomain) *ca.Authority {
	t.Helper()
	a, err := ca.Open(ca.Config{Dir: t.TempDir(), TrustDomain: td})
	check(t, err)
	return a
}

func numbered(b *spiffebundle.Bundle, seq uint64) *spiffebundle.Bundle {
	b.SetSequenceNumber(seq)
	return b
}

func TestSet(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	a, b := authority(t, east).Bundle(), authority(t, east).Bundle()
	noNumber := authority(t, east).Bundle()
	noNumber.ClearSequenceNumber()

	if err := s.Set(east, numbered(a, 5), "test"); !errors.Is(err, bundle.ErrUnrelated) {
		t.Errorf("before there is a relation: %v", err)
	}
	check(t, s.Relate(bundle.Relation{TrustDomain: east}))
	if _, ok := s.Get(east); ok {
		t.Error("a relation brings a bundle")
	}
	changed := s.Changed()
	check(t, s.Set(east, numbered(a, 5), "test"))
	<-changed
	changed = s.Changed()
	check(t, s.Set(east, numbered(a, 5), "test"))
	select {
	case <-changed:
		t.Error("the same again is a change")
	default:
	}
	for name, c := range map[string]struct {
		td   spiffeid.TrustDomain
		b    *spiffebundle.Bundle
		want error
	}{
		"older":                  {east, numbered(b.Clone(), 4), bundle.ErrStale},
		"another, same sequence": {east, numbered(b.Clone(), 5), bundle.ErrStale},
		"another trust domain":   {east, numbered(authority(t, west).Bundle(), 9), bundle.ErrTrustDomain},
		"empty":                  {east, numbered(spiffebundle.New(east), 9), bundle.ErrEmpty},
	} {
		t.Run(name, func(t *testing.T) {
			if err := s.Set(c.td, c.b, "a test"); !errors.Is(err, c.want) || !strings.Contains(err.Error(), "from a test") {
				t.Errorf("error %v, want %v", err, c.want)
			}
			if got, _ := s.Get(east); !got.Equal(a) {
				t.Error("the bundle in force changed")
			}
		})
	}
	check(t, s.SetVouched(east, numbered(b, 6), "test"))
	check(t, s.Set(west, authority(t, west).Bundle(), "own")) // needs no relation
	if got := open(t, dir); s.Sequences()[east] != 6 || !got.All()[east].Equal(s.All()[east]) || !got.All()[west].Equal(s.All()[west]) {
		t.Error("a restart forgets")
	}

	t.Run("an administrator replaces", func(t *testing.T) {
		check(t, s.Replace(east, noNumber, "anna"))
		if s.Sequences()[east] != 7 {
			t.Errorf("sequence %d, want one that readers see as newer", s.Sequences()[east])
		}
	})
	t.Run("removed, then unrelated", func(t *testing.T) {
		check(t, s.Remove(east))
		if _, ok := s.Get(east); ok || len(open(t, dir).All()) != 1 {
			t.Error("still there")
		}
		check(t, s.Set(east, numbered(a, 1), "test"))
		check(t, s.Unrelate(east))
		if _, ok := open(t, dir).Get(east); ok {
			t.Error("still there after a restart")
		}
		if err := s.Set(east, numbered(a, 100), "mirror"); !errors.Is(err, bundle.ErrUnrelated) {
			t.Errorf("comes back: %v", err)
		}
	})
}

func TestWithoutSequence(t *testing.T) {
	s := open(t, "")
	check(t, s.Relate(bundle.Relation{TrustDomain: east}))
	b := spiffebundle.New(east)
	for i := range uint64(3) {
		b = b.Clone()
		b.AddX509Authority(authority(t, east).Bundle().X509Authorities()[0])
		check(t, s.Set(east, b, "test"))
		check(t, s.Set(east, b, "test"))
		if got := s.Sequences()[east]; got != i+1 {
			t.Errorf("sequence %d, want %d", got, i+1)
		}
	}
}

func TestRelations(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	good := bundle.Relation{TrustDomain: east, URL: "https://east:7446", Profile: bundle.HTTPSSPIFFE, EndpointID: identity.ControlPlaneID(east)}
	for name, r := range map[string]bundle.Relation{
		"none":         {},
		"itself":       {TrustDomain: west},
		"plain HTTP":   {TrustDomain: east, URL: "http://east", Profile: bundle.HTTPSWeb},
		"no ID":        {TrustDomain: east, URL: "https://east", Profile: bundle.HTTPSSPIFFE},
		"some profile": {TrustDomain: east, URL: "https://east", Profile: "https_maybe"},
	} {
		if err := s.Relate(r); err == nil {
			t.Errorf("%s: related", name)
		}
	}
	before := s.Revision()
	check(t, s.Relate(good))
	check(t, s.Relate(good))
	if s.Revision() != before+1 {
		t.Errorf("revision %d after %d", s.Revision(), before)
	}
	again := open(t, dir)
	if got, ok := again.Related(east); !ok || got != good || again.Revision() != s.Revision() {
		t.Errorf("after a restart: %+v, revision %d", got, again.Revision())
	}
	check(t, s.Unrelate(east))
	if s.Revision() != before+2 || len(open(t, dir).Relations()) != 0 {
		t.Error("not unrelated")
	}
}

func TestDamagedFiles(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	north := spiffeid.RequireTrustDomainFromString("north.demo")
	for _, td := range []spiffeid.TrustDomain{east, north} {
		check(t, s.Relate(bundle.Relation{TrustDomain: td}))
		check(t, s.Set(td, authority(t, td).Bundle(), "test"))
	}
	check(t, os.WriteFile(filepath.Join(dir, "east.demo.bundle.json"), []byte("{"), 0o600))
	var log bytes.Buffer
	again, err := bundle.Open(bundle.Config{Dir: dir, TrustDomain: west, Log: slog.New(slog.NewTextHandler(&log, nil))})
	check(t, err)
	if _, ok := again.Get(east); ok || !strings.Contains(log.String(), "east.demo.bundle.json") {
		t.Errorf("the damaged bundle is there, or nobody is told: %s", &log)
	}
	if _, ok := again.Get(north); !ok {
		t.Error("one damaged bundle takes another with it")
	}
	check(t, again.Set(east, authority(t, east).Bundle(), "mirror")) // heals

	path := filepath.Join(dir, "relations.json")
	check(t, os.WriteFile(path, []byte(`{"relations":[{"trust_domain":"UPPER"}]}`), 0o600))
	if _, err := bundle.Open(bundle.Config{Dir: dir, TrustDomain: west}); err == nil || !strings.Contains(err.Error(), path) {
		t.Errorf("error %v does not name %s", err, path)
	}
}

func TestReadIsBounded(t *testing.T) {
	if _, err := bundle.Read(east, io.LimitReader(endless{}, 1<<40)); err == nil || !strings.Contains(err.Error(), "larger than") {
		t.Errorf("error: %v", err)
	}
	leaf, err := authority(t, east).NewSVID(spiffeid.RequireFromString("spiffe://east.demo/x"), 0)
	check(t, err)
	b := spiffebundle.New(east)
	b.AddX509Authority(leaf.Certificates[0])
	if err := bundle.Check(b); err == nil {
		t.Error("an SVID passes as an authority")
	}
	stolen := spiffebundle.FromX509Authorities(east, authority(t, west).Bundle().X509Authorities())
	if err := bundle.Check(stolen); err == nil {
		t.Error("west's root passes as east's")
	}
}

type endless struct{}

func (endless) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = ' '
	}
	return len(p), nil
}

func FuzzParse(f *testing.F) {
	data, err := authority(f, east).Bundle().Marshal()
	check(f, err)
	f.Add(data)
	for _, s := range []string{`{}`, `{"keys":[]}`, `{"keys":[{"use":"jwt-svid","kid":"a","kty":"EC"}]}`, `{"keys":[{"use":"x509-svid"}],"spiffe_sequence":18446744073709551615}`,
		`{"keys":[],"spiffe_refresh_hint":9223372036854775807}`} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		b, err := bundle.Parse(east, data)
		if err != nil {
			return
		}
		if hint, ok := b.RefreshHint(); ok && (hint < time.Second || hint > 24*time.Hour) {
			t.Errorf("refresh hint %v", hint)
		}
		again, err := b.Marshal()
		if err != nil {
			t.Fatalf("what was decoded does not encode: %v", err)
		}
		if b.Empty() {
			return
		}
		if c, err := bundle.Parse(east, again); err != nil || !b.Equal(c) {
			t.Errorf("does not survive encoding: %v", err)
		}
	})
}

// endpoint is east's bundle endpoint over bufconn.
type endpoint struct {
	ca    *ca.Authority
	store *bundle.Store
	src   *identity.Source

	mu   sync.Mutex
	lis  *bufconn.Listener // guarded by mu
	hits int               // guarded by mu
}

func newEndpoint(t *testing.T, id spiffeid.ID, handler func(http.Handler) http.Handler) *endpoint {
	t.Helper()
	e := &endpoint{ca: authority(t, east), src: identity.NewSource(), lis: bufconn.Listen(1 << 20)}
	var err error
	e.store, err = bundle.Open(bundle.Config{TrustDomain: east})
	check(t, err)
	check(t, e.store.Set(east, e.ca.Bundle(), "own"))
	svid, err := e.ca.NewSVID(id, 0)
	check(t, err)
	e.src.SetSVID(svid)
	h := http.Handler(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		e.mu.Lock()
		e.hits++
		e.mu.Unlock()
		e.store.Handler().ServeHTTP(w, r)
	}))
	if handler != nil {
		h = handler(h)
	}
	s := &http.Server{Handler: h, ErrorLog: slog.NewLogLogger(slog.DiscardHandler, 0)}
	done := make(chan error, 1)
	go func() { done <- s.Serve(tls.NewListener(e.lis, bundle.EndpointTLS(e.src))) }()
	t.Cleanup(func() {
		_ = s.Close()
		<-done
	})
	return e
}

func (e *endpoint) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	return e.lis.DialContext(ctx)
}

func (e *endpoint) count() int {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.hits
}

// puller returns west's store, which knows east by its first bundle, and a running Puller.
func (e *endpoint) puller(t *testing.T, id spiffeid.ID) (*bundle.Store, *bundle.Puller) {
	t.Helper()
	s := open(t, "")
	check(t, s.Relate(bundle.Relation{TrustDomain: east, URL: "https://east.example:7446/bundle", Profile: bundle.HTTPSSPIFFE, EndpointID: id}))
	check(t, s.Set(east, e.ca.Bundle(), "join"))
	p, err := bundle.NewPuller(bundle.PullerConfig{Store: s, Dial: e.dial})
	check(t, err)
	return s, p
}

func TestPullFollowsRotation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		id := identity.ControlPlaneID(east)
		e := newEndpoint(t, id, nil)
		s, p := e.puller(t, id)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- p.Run(ctx) }()
		time.Sleep(time.Second)
		if e.count() != 1 {
			t.Fatalf("%d pulls at the start", e.count())
		}
		check(t, e.ca.Prepare())
		check(t, e.store.Set(east, e.ca.Bundle(), "own"))
		time.Sleep(5 * time.Minute) // the refresh hint
		if got, _ := s.Get(east); len(got.X509Authorities()) != 2 {
			t.Errorf("%d roots after the refresh hint", len(got.X509Authorities()))
		}
		check(t, e.ca.Activate())
		svid, err := e.ca.NewSVID(id, 0) // by the new root
		check(t, err)
		e.src.SetSVID(svid)
		check(t, e.store.Set(east, e.ca.Bundle(), "own"))
		time.Sleep(5 * time.Minute)
		if s.Sequences()[east] != e.ca.Sequence() {
			t.Errorf("sequence %d, want %d", s.Sequences()[east], e.ca.Sequence())
		}
		if n := e.count(); n > 4 {
			t.Errorf("%d pulls in ten minutes", n)
		}
		cancel()
		check(t, <-done)
	})
}

func TestPullRefusals(t *testing.T) {
	id := identity.ControlPlaneID(east)
	for name, c := range map[string]struct {
		presents spiffeid.ID
		handler  func(http.Handler) http.Handler
		want     string
	}{
		"another ID": {spiffeid.RequireFromString("spiffe://east.demo/ns/x/sa/y"), nil, "spiffe://east.demo/ns/x/sa/y"},
		"an error":   {id, answer(func(w http.ResponseWriter) { http.Error(w, "no", 500) }), "500"},
		"a redirect": {id, answer(func(w http.ResponseWriter) { w.Header().Set("Location", "https://evil"); w.WriteHeader(302) }), "redirects"},
		"noise":      {id, answer(func(w http.ResponseWriter) { fmt.Fprint(w, "hello") }), "parse"},
		"too much":   {id, answer(func(w http.ResponseWriter) { _, _ = io.Copy(w, io.LimitReader(endless{}, 3<<20)) }), "larger than"},
		"no keys":    {id, answer(func(w http.ResponseWriter) { fmt.Fprint(w, `{"keys":[],"spiffe_sequence":9999999999}`) }), "no X.509 authority"},
	} {
		t.Run(name, func(t *testing.T) {
			e := newEndpoint(t, c.presents, c.handler)
			s, p := e.puller(t, id)
			before, _ := s.Get(east)
			if err := p.Refresh(t.Context(), east); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %v, want %q", err, c.want)
			}
			if after, _ := s.Get(east); !after.Equal(before) {
				t.Error("the bundle in force changed")
			}
		})
	}
	t.Run("another authority", func(t *testing.T) {
		e := newEndpoint(t, id, nil)
		s, p := e.puller(t, id)
		check(t, s.Replace(east, authority(t, east).Bundle(), "test"))
		if err := p.Refresh(t.Context(), east); err == nil {
			t.Error("an endpoint that the bundle does not verify is believed")
		}
	})
}

func answer(f func(http.ResponseWriter)) func(http.Handler) http.Handler {
	return func(http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { f(w) })
	}
}

// An endpoint that is dead when the relation is made, or for a while, is pulled as soon as it is back (design note 13).
func TestPullRetries(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		id := identity.ControlPlaneID(east)
		e := newEndpoint(t, id, nil)
		s, _ := e.puller(t, id)
		var mu sync.Mutex
		dead, tries := true, 0
		p, err := bundle.NewPuller(bundle.PullerConfig{Store: s, Dial: func(ctx context.Context, n, a string) (net.Conn, error) {
			mu.Lock()
			defer mu.Unlock()
			tries++
			if dead {
				return nil, errors.New("no route to host")
			}
			return e.dial(ctx, n, a)
		}})
		check(t, err)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- p.Run(ctx) }()
		check(t, e.ca.Prepare())
		check(t, e.store.Set(east, e.ca.Bundle(), "own"))
		time.Sleep(10 * time.Minute)
		mu.Lock()
		if tries < 5 || tries > 15 {
			t.Errorf("%d tries in ten minutes", tries)
		}
		dead = false
		mu.Unlock()
		time.Sleep(5 * time.Minute)
		if s.Sequences()[east] != e.ca.Sequence() {
			t.Error("not pulled after the endpoint came back")
		}
		cancel()
		check(t, <-done)
	})
}

// go-spiffe's own client reads our endpoint.
func TestHandlerForOthers(t *testing.T) {
	id := identity.ControlPlaneID(east)
	e := newEndpoint(t, id, nil)
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	srv := &http.Server{Handler: e.store.Handler()}
	done := make(chan error, 1)
	go func() { done <- srv.Serve(tls.NewListener(lis, bundle.EndpointTLS(e.src))) }()
	b, err := federation.FetchBundle(t.Context(), east, "https://"+lis.Addr().String(), federation.WithSPIFFEAuth(e.ca.Bundle(), id))
	check(t, err)
	if !b.Equal(e.ca.Bundle()) {
		t.Error("another bundle arrives")
	}
	resp, err := (&http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}}).Post("https://"+lis.Addr().String(), "", http.NoBody)
	check(t, err)
	_ = resp.Body.Close()
	if resp.StatusCode != http.StatusMethodNotAllowed {
		t.Errorf("POST: %s", resp.Status)
	}
	check(t, srv.Close())
	<-done
}

func TestRunSource(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, src := open(t, ""), identity.NewSource()
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- s.RunSource(ctx, src) }()
		check(t, s.Relate(bundle.Relation{TrustDomain: east}))
		check(t, s.Set(east, authority(t, east).Bundle(), "test"))
		synctest.Wait()
		if len(src.Bundles()) != 1 {
			t.Error("not in the Source")
		}
		check(t, s.Unrelate(east))
		synctest.Wait()
		if len(src.Bundles()) != 0 {
			t.Error("still in the Source")
		}
		cancel()
		check(t, <-done)
	})
}
