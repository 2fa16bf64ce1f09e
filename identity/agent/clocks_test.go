package agent_test

import (
	"context"
	"errors"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"

	"github.com/hanse-mesh/hanse/identity"
	"github.com/hanse-mesh/hanse/identity/agent"
	"github.com/hanse-mesh/hanse/identity/attest"
	"github.com/hanse-mesh/hanse/identity/bundle"
	"github.com/hanse-mesh/hanse/identity/ca"
)

// world is two clusters with a workload each, whose clocks and links fail as they are told.
type world struct {
	t          *testing.T
	west, east *side
	start      time.Time
	cut        atomic.Bool // between the clusters: bundles and acknowledgements; calls go on

	restarting atomic.Bool  // somebody is, and nothing is carried
	carried    atomic.Int64 // times that bundles and acknowledgements were, or were not since the link was cut

	mu      sync.Mutex
	refused []refusal // guarded by mu
	calls   int       // guarded by mu

	verdicts map[string]verdict // by the caller's cluster; owned by live
}

// side is a cluster: the identity side of a hansed, and a workload with its agent.
type side struct {
	*server
	setup
	name, other       string
	clock, agentClock atomic.Int64 // nanoseconds that the hansed's and the agent's clock are ahead of the true time
	cut               atomic.Bool  // between the agent and its hansed
	agent             *agent.Agent
	acked             atomic.Uint64 // of this trust domain's bundle, the sequence that the other cluster has said to have loaded
}

// verdict is what the verification of an SVID came to. It is the same as long as neither side has another SVID or bundle, and the verifier's
// clock has passed no bound of a certificate.
type verdict struct {
	err         error
	from, to    <-chan struct{} // Changed of the Sources
	since, till time.Time       // by the verifier's clock
}

// setup is what is not as ever in a world.
type setup struct {
	rootLife  time.Duration
	age       time.Duration          // of the first roots, when everything else begins
	agentSVID time.Duration          // life of agents' own SVIDs; 0: a day
	skew      func(west, east *side) // sets clocks before anything happens; may be nil
}

type refusal struct {
	at     time.Duration // since the start
	caller string        // the cluster of the one that was refused
	err    error
}

func (s *side) now() time.Time      { return time.Now().Add(time.Duration(s.clock.Load())) }
func (s *side) agentNow() time.Time { return time.Now().Add(time.Duration(s.agentClock.Load())) }

// loaded is the sequence of td's bundle that the hansed and the workload of s have.
func (s *side) loaded(td spiffeid.TrustDomain) uint64 {
	var seq uint64
	if b, ok := s.agent.Source().Bundles()[td]; ok {
		seq, _ = b.SequenceNumber()
	}
	if td != s.td {
		seq = min(seq, s.bundles.Sequences()[td])
	}
	return seq
}

// newWorld starts two clusters of which each has to acknowledge the other's roots.
func newWorld(t *testing.T, with setup) *world {
	t.Helper()
	w := &world{t: t, west: &side{}, east: &side{}, verdicts: map[string]verdict{}}
	if with.skew != nil {
		with.skew(w.west, w.east)
	}
	for _, s := range []*side{w.west, w.east} {
		s.setup, s.name = with, "west"
		s.other = "east"
		if s == w.east {
			s.name, s.other = s.other, s.name
		}
		s.server = newServer(t, s.name+".demo", s.options())
	}
	time.Sleep(with.age)
	w.west.start()
	w.east.start()
	for _, p := range [][2]*side{{w.west, w.east}, {w.east, w.west}} {
		from, to := p[0], p[1]
		check(t, to.bundles.Relate(bundle.Relation{TrustDomain: from.td}))
		check(t, to.bundles.SetVouched(from.td, from.authority.Bundle(), "join"))
		from.acked.Store(from.authority.Sequence())
	}
	for _, s := range []*side{w.west, w.east} {
		cfg := s.agentConfig(s.token("spiffe://" + s.td.Name() + "/ns/shop/sa/app"))
		cfg.Now, cfg.SyncInterval = s.agentNow, syncInterval
		dial := cfg.Dial
		cfg.Dial = func(ctx context.Context, addr string) (net.Conn, error) {
			if s.cut.Load() {
				return nil, errors.New("no route to host")
			}
			return dial(ctx, addr)
		}
		s.agent, _ = runAgent(t, cfg)
		wait(t, s.agent.Source())
	}
	w.start = time.Now().Add(-with.age)
	run(t, w.live, nil)
	return w
}

func (s *side) options() options {
	return options{now: s.now, agentLife: s.agentSVID, ca: ca.Config{RootLife: s.rootLife, Acked: s.acknowledged}}
}

// acknowledged is what a hansed asks before its next root signs: the other cluster, stock agents and its own workload.
func (s *side) acknowledged(seq uint64) (bool, []string) {
	missing := s.api.Missing(s.td, seq)
	if s.acked.Load() < seq {
		missing = append(missing, "cluster "+s.other)
	}
	if s.loaded(s.td) < seq {
		missing = append(missing, "own workload")
	}
	return len(missing) == 0, missing
}

const (
	// pace is how often bundles and acknowledgements travel while the link stands. Workloads call each other every third time.
	pace = 10 * time.Second
	// syncInterval of agents is longer here than the default of 5 s, and no sidecar's xDS tells of new bundles before it is over.
	syncInterval = 10 * time.Minute
)

// live carries bundles and acknowledgements, and lets the workloads call each other, until ctx ends.
func (w *world) live(ctx context.Context) error {
	tick := time.NewTicker(pace)
	defer tick.Stop()
	for i := 0; ; i++ {
		for _, p := range [][2]*side{{w.west, w.east}, {w.east, w.west}} {
			from, to := p[0], p[1]
			if !w.cut.Load() && !w.restarting.Load() {
				if to.bundles.Sequences()[from.td] != from.authority.Sequence() {
					err := to.bundles.SetVouched(from.td, from.authority.Bundle(), "federation")
					if err != nil && !errors.Is(err, bundle.ErrStale) {
						return err
					}
				}
				from.acked.Store(to.loaded(from.td))
			}
			if i%3 == 0 {
				w.call(from, to)
			}
		}
		w.carried.Add(1)
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// call has to verify the SVID that from presents now, as its sidecar does, by its own clock.
func (w *world) call(from, to *side) {
	v, now := w.verdicts[from.name], to.agentNow()
	if v.from != from.agent.Source().Changed() || v.to != to.agent.Source().Changed() || now.Before(v.since) || !now.Before(v.till) {
		v = verify(from, to, now)
		w.verdicts[from.name] = v
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.calls++
	if v.err != nil {
		w.refused = append(w.refused, refusal{time.Since(w.start).Round(time.Second), from.name, v.err})
	}
}

func verify(from, to *side, now time.Time) verdict {
	v := verdict{from: from.agent.Source().Changed(), to: to.agent.Source().Changed(), since: now, till: now.Add(24 * time.Hour)}
	svid, err := from.agent.Source().GetX509SVID()
	if err != nil {
		v.err = err
		return v
	}
	certs := slices.Clone(svid.Certificates)
	if b, err := to.agent.Source().GetX509BundleForTrustDomain(from.td); err == nil {
		certs = append(certs, b.X509Authorities()...)
	}
	for _, c := range certs {
		for _, bound := range []time.Time{c.NotBefore, c.NotAfter.Add(1)} {
			if bound.After(now) && bound.Before(v.till) {
				v.till = bound
			}
		}
	}
	_, v.err = identity.Verify(svid.Certificates, to.agent.Source(), now)
	return v
}

// sofar returns what was refused since the last time that it was asked.
func (w *world) sofar() []refusal {
	w.mu.Lock()
	defer w.mu.Unlock()
	r := w.refused
	w.refused = nil
	return r
}

// restart kills the hansed of s and starts it again from its disk.
func (w *world) restart(s *side) {
	w.t.Helper()
	w.restarting.Store(true)
	for was := w.carried.Load(); w.carried.Load() == was; {
		time.Sleep(pace)
	}
	s.restart(s.options(), time.Minute)
	w.restarting.Store(false)
}

func (w *world) none(during string) {
	w.t.Helper()
	if r := w.sofar(); len(r) > 0 {
		w.t.Errorf("%s: %d calls refused, the first %v after the start, of %s: %v; the last after %v", during, len(r), r[0].at, r[0].caller, r[0].err, r[len(r)-1].at)
	}
}

// sleepCut lets time go by with a link cut.
func sleepCut(link *atomic.Bool, d time.Duration) {
	link.Store(true)
	time.Sleep(d)
	link.Store(false)
}

func (s *side) activeRoot() string {
	for _, r := range s.authority.Roots() {
		if r.Phase == "active" {
			return r.KeyID
		}
	}
	return ""
}

// TestPartition cuts two clusters off from each other for 12 hours, in the midst of which both want another root. Neither root signs before
// the other cluster knows it, so no call between them is refused; nor is one after that.
func TestPartition(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, setup{rootLife: 48 * time.Hour, age: 22 * time.Hour, agentSVID: 6 * time.Hour}) // roots live 7 days by default, and then there is more time
		west, east := w.west.activeRoot(), w.east.activeRoot()
		time.Sleep(time.Hour)
		w.none("before")
		sleepCut(&w.cut, 12*time.Hour)
		w.none("12 hours of partition, with a root announced on each side")
		if len(w.west.authority.Roots()) != 2 || w.west.activeRoot() != west || w.east.activeRoot() != east {
			t.Errorf("a root signs that the other cluster cannot know: %+v, %+v", w.west.authority.Roots(), w.east.authority.Roots())
		}
		time.Sleep(pace + 2*syncInterval)
		if w.west.activeRoot() == west || w.east.activeRoot() == east {
			t.Error("the new roots do not sign although they are known")
		}
		time.Sleep(7 * time.Hour)
		w.none("after the partition")
		if slices.ContainsFunc(w.west.authority.Roots(), func(r ca.Root) bool { return r.KeyID == west }) {
			t.Error("the old root is still there")
		}
	})
}

// TestPartitionLongerThanPatience: when a quarter of the old root's life remains the next one signs, known or not. From then on, and not
// before, the other cluster refuses what it signed; the end of the partition ends that.
func TestPartitionLongerThanPatience(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, setup{rootLife: 48 * time.Hour, age: 22 * time.Hour})
		time.Sleep(time.Hour)
		sleepCut(&w.cut, 14*time.Hour)
		time.Sleep(pace + syncInterval)
		refused := w.sofar()
		if len(refused) == 0 {
			t.Fatal("nothing was refused: the roots did not move on")
		}
		if at := refused[0].at; at < 36*time.Hour {
			t.Errorf("refused after %v, before the time to wait is over: %v", at, refused[0].err)
		}
		time.Sleep(time.Hour)
		w.none("after the partition")
	})
}

// TestAgentWithoutControlPlane cuts a workload off from its hansed for 12 hours. It is accepted as long as its SVID is valid, half of its life
// at the least, and again as soon as the link stands, without a new token.
func TestAgentWithoutControlPlane(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, setup{rootLife: 7 * 24 * time.Hour})
		time.Sleep(80 * time.Minute)
		svid, err := w.west.agent.Source().GetX509SVID()
		check(t, err)
		left := time.Until(svid.Certificates[0].NotAfter)
		if left < 27*time.Minute { // half of an hour, less a tenth of that
			t.Errorf("an SVID with %v left was not renewed", left)
		}
		w.none("before")
		sleepCut(&w.west.cut, 12*time.Hour)
		refused := w.sofar()
		if len(refused) == 0 || refused[0].caller != "west" {
			t.Fatalf("what was refused: %+v", refused)
		}
		if at := refused[0].at; at < 80*time.Minute+left-time.Second {
			t.Errorf("refused after %v, with a valid SVID: %v", at, refused[0].err)
		}
		for _, r := range refused {
			if r.caller != "west" || !strings.Contains(r.err.Error(), "expired") {
				t.Fatalf("refused: %+v", r)
			}
		}
		time.Sleep(pace + syncInterval)
		w.sofar()
		time.Sleep(time.Hour)
		w.none("after the partition")
	})
}

// TestClockSkew lets clocks be ten minutes wrong while the roots of both clusters rotate, and hansed restarts in the midst of it: no call is
// refused.
func TestClockSkew(t *testing.T) {
	t.Parallel()
	const ten = int64(10 * time.Minute)
	for name, skew := range map[string]func(west, east *side){
		"hansed ahead":                    func(west, _ *side) { west.clock.Store(ten) },
		"hansed behind":                   func(west, _ *side) { west.clock.Store(-ten) },
		"workload ahead":                  func(west, _ *side) { west.agentClock.Store(ten) },
		"workload behind":                 func(west, _ *side) { west.agentClock.Store(-ten) },
		"cluster ahead":                   func(west, _ *side) { west.clock.Store(ten); west.agentClock.Store(ten) },
		"cluster behind":                  func(west, _ *side) { west.clock.Store(-ten); west.agentClock.Store(-ten) },
		"hansed ahead, other one behind":  func(west, east *side) { west.clock.Store(ten / 2); east.clock.Store(-ten / 2) },
		"hansed ahead, its agents behind": func(west, _ *side) { west.clock.Store(ten / 2); west.agentClock.Store(-ten / 2) },
	} {
		t.Run(name+", at the start", func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, setup{rootLife: 4 * time.Hour, skew: skew})
				time.Sleep(10 * time.Minute)
				w.none("with wrong clocks, and SVIDs that are no older than their root")
			})
		})
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, setup{rootLife: 4 * time.Hour, age: 75 * time.Minute, skew: skew})
				west, east := w.west.activeRoot(), w.east.activeRoot()
				time.Sleep(40 * time.Minute) // about now the next roots are announced
				w.restart(w.west)
				w.cut.Store(true)
				time.Sleep(20 * time.Minute)
				w.restart(w.east)
				w.cut.Store(false)
				time.Sleep(2 * time.Hour) // the old roots are dropped, and the next ones made
				w.none("with wrong clocks")
				if w.west.activeRoot() == west || w.east.activeRoot() == east {
					t.Error("no root was rotated")
				}
			})
		})
	}
	t.Run("a clock put right", func(t *testing.T) {
		t.Parallel()
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t, setup{rootLife: 4 * time.Hour, skew: func(west, _ *side) { west.clock.Store(ten) }})
			time.Sleep(90 * time.Minute)
			w.west.clock.Store(0)
			time.Sleep(31 * time.Minute) // with the next root just made
			w.west.clock.Store(-ten)
			time.Sleep(90 * time.Minute)
			w.west.clock.Store(0)
			time.Sleep(time.Hour)
			w.none("while a clock jumped")
		})
	})
}

// TestClockSkewBound: an SVID is 15 minutes old when it is made, and has half of its life left, less a tenth of that, when it is renewed. Up
// to that a verifier's clock may be wrong, behind and ahead; beyond it, calls are refused for a time.
func TestClockSkewBound(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name string
		skew time.Duration
		ok   bool
	}{
		{"14 minutes behind", -14 * time.Minute, true},
		{"16 minutes behind", -16 * time.Minute, false},
		{"25 minutes ahead", 25 * time.Minute, true},
		{"40 minutes ahead", 40 * time.Minute, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, setup{rootLife: 7 * 24 * time.Hour})
				time.Sleep(time.Hour) // an authority that has just been made has SVIDs that are no older than it is
				w.none("before")
				w.east.agentClock.Store(int64(c.skew))
				time.Sleep(2 * time.Hour)
				if refused := w.sofar(); (len(refused) == 0) != c.ok {
					t.Errorf("%d of %d calls refused: %+v", len(refused), w.calls, slices.Compact(refused[:min(len(refused), 1)]))
				}
			})
		})
	}
}

// TestJWTClockSkew: a JWT-SVID is good for a minute longer at either end, by the verifier's clock.
func TestJWTClockSkew(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var ahead atomic.Int64 // of the issuer
		s := newServer(t, "west.demo", options{now: func() time.Time { return time.Now().Add(time.Duration(ahead.Load())) }})
		id := spiffeid.RequireFromString(frontend)
		bundles := jwtbundle.NewSet(s.authority.Bundle().JWTBundle())
		verify := func(token string) error {
			_, err := jwtsvid.ParseAndValidate(token, bundles, []string{"db"})
			return err
		}
		for _, c := range []struct {
			issuer, later time.Duration
			ok            bool
		}{
			{59 * time.Second, 0, true}, {62 * time.Second, 0, false}, // the verifier is behind
			{0, 5*time.Minute + 59*time.Second, true}, {0, 5*time.Minute + 62*time.Second, false}, // it is ahead, or the token is old
		} {
			ahead.Store(int64(c.issuer))
			svid, err := s.authority.SignJWT(t.Context(), id, []string{"db"}, 0)
			check(t, err)
			time.Sleep(c.later)
			if err := verify(svid.Token); (err == nil) != c.ok {
				t.Errorf("issuer %v ahead, %v later: %v", c.issuer, c.later, err)
			}
		}
	})
}

// TestDistrustOutlives: what is distrusted stays so through a partition, through new roots of that trust domain, a restart and wrong clocks.
func TestDistrustOutlives(t *testing.T) {
	t.Parallel()
	for name, skew := range map[string]func(west, east *side){
		"right clocks":   nil,
		"refuser ahead":  func(_, east *side) { east.clock.Store(int64(10 * time.Minute)) },
		"refuser behind": func(_, east *side) { east.clock.Store(-int64(10 * time.Minute)) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, setup{rootLife: 4 * time.Hour, skew: skew})
				time.Sleep(30 * time.Minute)
				w.none("before")
				check(t, w.east.bundles.Distrust(w.west.td, ""))
				time.Sleep(pace + syncInterval)
				w.sofar()
				all := func(d time.Duration, during string) {
					t.Helper()
					w.mu.Lock()
					before := w.calls
					w.mu.Unlock()
					time.Sleep(d)
					w.mu.Lock()
					calls := w.calls - before
					w.mu.Unlock()
					refused := 0
					for _, r := range w.sofar() {
						if r.caller == "west" {
							refused++
						}
					}
					if refused < calls/2-1 || calls == 0 {
						t.Errorf("%s: of %d calls, half of them west's, %d were refused", during, calls, refused)
					}
				}
				all(30*time.Minute, "distrusted")
				w.restart(w.east)
				all(30*time.Minute, "after a restart")
				w.cut.Store(true)
				all(90*time.Minute, "cut off, with a new root of west")
				w.cut.Store(false)
				all(90*time.Minute, "with west's new bundle")
				_, err := w.east.bundles.Trust(w.west.td, "")
				check(t, err)
				time.Sleep(pace + syncInterval)
				w.sofar()
				time.Sleep(time.Hour)
				w.none("trusted again")
			})
		})
	}
}

// TestTokenClockSkew: hansed alone says whether an agent token lives, by the clock with which it made it, so that wrong clocks neither shorten
// nor lengthen its life. Where the agent's clock is too far behind to verify hansed, the token is not sent, and serves once the clock is right.
func TestTokenClockSkew(t *testing.T) {
	t.Parallel()
	const ten = 10 * time.Minute
	for _, c := range []struct {
		name          string
		hansed, agent time.Duration
		verifies      bool
	}{
		{"right clocks", 0, 0, true},
		{"hansed ahead", ten, 0, true}, {"hansed behind", -ten, 0, true},
		{"agent ahead", 0, ten, true}, {"agent behind", 0, -ten, true},
		{"both ahead", ten, ten, true}, {"both behind", -ten, -ten, true},
		{"hansed behind, agent ahead", -ten, ten, true},
		{"hansed ahead, agent behind by more than 15 minutes of it", ten, -ten, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				s := newServer(t, "west.demo", options{now: func() time.Time { return time.Now().Add(c.hansed) }})
				s.start()
				token := func() string {
					token, _, err := s.tokens.Create(t.Context(), attest.Grant{ID: spiffeid.RequireFromString(frontend)}, time.Minute)
					check(t, err)
					return token
				}
				var ahead atomic.Int64
				ahead.Store(int64(c.agent))
				config := func(token string) agent.Config {
					cfg := s.agentConfig(token)
					cfg.Now = func() time.Time { return time.Now().Add(time.Duration(ahead.Load())) }
					return cfg
				}
				young := config(token())
				time.Sleep(40 * time.Second)
				a, _ := runAgent(t, young)
				time.Sleep(10 * time.Second)
				if svid, err := a.Source().GetX509SVID(); (err == nil) != c.verifies {
					t.Fatalf("with a token of 10 more seconds: %v, %v", svid, err)
				}
				ahead.Store(0)
				time.Sleep(6 * time.Second) // one try
				_, err := a.Source().GetX509SVID()
				check(t, err)
				ahead.Store(int64(c.agent))
				old := config(token())
				time.Sleep(61 * time.Second)
				if !c.verifies {
					ahead.Store(0)
				}
				b, err := agent.New(old)
				check(t, err)
				ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
				defer cancel()
				if err := b.Run(ctx); !errors.Is(err, agent.ErrTokenRefused) || !strings.Contains(err.Error(), "expired, at ") {
					t.Errorf("with a token that expired a second ago: %v", err)
				}
			})
		})
	}
}
