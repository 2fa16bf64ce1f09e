package ca

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Prepare makes the next root and puts it into the bundle. A root that is prepared already is kept, unless it expired.
func (a *Authority) Prepare() error { return a.prepare(false) }

func (a *Authority) prepare(held bool) error {
	if r := a.state.Load().with(prepared); r != nil && a.cfg.Now().Before(r.cert.NotAfter) {
		if !held || r.held {
			return nil
		}
		return a.editRoot("", prepared, false, func(r *root) { r.held = true })
	}
	return a.prepareFresh(held)
}

// prepareFresh makes a root, and puts it in the place of one that was prepared.
func (a *Authority) prepareFresh(held bool) error {
	next, err := newRoot(a.cfg, a.cfg.Now())
	if err == nil {
		next.held = held
		err = a.change(func(n *state) bool {
			n.roots = append(slices.DeleteFunc(n.roots, func(r *root) bool { return r.phase == prepared }), next)
			return true
		})
	}
	if err != nil {
		return fmt.Errorf("prepare root of %s: %w", a.cfg.TrustDomain, err)
	}
	a.log.Info("root prepared", "root", next, "sequence", a.Sequence())
	return nil
}

// Activate makes the prepared root sign and the active one old. It is an error if none is prepared.
func (a *Authority) Activate() error {
	if a.state.Load().with(prepared) == nil {
		return fmt.Errorf("activate root of %s: none is prepared", a.cfg.TrustDomain)
	}
	var signs *root
	err := a.change(func(n *state) bool {
		for i, r := range n.roots {
			c := *r
			switch r.phase {
			case active:
				c.phase = old
			case prepared:
				c.phase, c.held, signs = active, false, &c
				c.signedUntil = a.cfg.Now().Add(2 * a.cfg.X509Life)
				if c.signedUntil.After(c.cert.NotAfter) {
					c.signedUntil = c.cert.NotAfter
				}
			}
			n.roots[i] = &c
		}
		return true
	})
	if err != nil {
		return fmt.Errorf("activate root of %s: %w", a.cfg.TrustDomain, err)
	}
	a.log.Info("root active", "root", signs)
	return nil
}

// DropOld takes those old roots out of the bundle whose every SVID has expired, and added authorities that have.
func (a *Authority) DropOld() error {
	now := a.cfg.Now()
	gone := func(r *root) bool {
		return r.phase == old && (!now.Before(r.signedUntil) || !now.Before(r.cert.NotAfter))
	}
	ended := func(d Added) bool { return d.expired(now) }
	if st := a.state.Load(); !slices.ContainsFunc(st.roots, gone) && !slices.ContainsFunc(st.added, ended) {
		return nil
	}
	err := a.change(func(n *state) bool {
		n.roots = slices.DeleteFunc(n.roots, gone)
		n.added = slices.DeleteFunc(slices.Clone(n.added), ended)
		return true
	})
	if err != nil {
		return fmt.Errorf("drop old roots of %s: %w", a.cfg.TrustDomain, err)
	}
	a.log.Info("old root dropped", "sequence", a.Sequence())
	return nil
}

// Run rotates the roots until ctx ends. What the disk refuses is logged and tried again; the last good state signs on.
func (a *Authority) Run(ctx context.Context) error {
	timer := time.NewTimer(0)
	defer timer.Stop()
	upstream := a.upstreamChanged()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-timer.C:
		case <-a.wake:
		case <-upstream:
		}
		upstream = a.upstreamChanged() // before step looks
		wait, err := a.step()
		if err != nil {
			a.metrics.failures.Inc()
			a.log.Error("cannot rotate; the present root signs on", "error", err)
		}
		timer.Reset(wait)
	}
}

// step does what is due and says when to look again.
func (a *Authority) step() (time.Duration, error) {
	now := a.cfg.Now()
	poll := min(max(a.cfg.RootLife/200, 20*time.Millisecond), 5*time.Second)
	if err := errors.Join(a.DropOld(), a.followUpstream(), a.replaceExpired(now, false)); err != nil {
		return poll, err
	}
	st := a.state.Load()
	act, next := st.with(active), st.with(prepared)
	switch {
	case next == nil && (!now.Before(act.created.Add(act.life()/2)) || act.key.Curve != a.cfg.Curve || a.moved(act)):
		return poll, a.Prepare()
	case next != nil:
		if age := now.Sub(next.created); age >= 0 && age < soon {
			poll = min(poll, soonPoll) // a person may be watching, and most acknowledge within a second
		}
		return poll, a.activateWhenKnown(now, st.sequence, act, next)
	}
	due := act.created.Add(act.life() / 2)
	for _, r := range st.roots {
		if r.phase == old && r.signedUntil.Before(due) {
			due = r.signedUntil
		}
	}
	return min(max(due.Sub(now), 20*time.Millisecond), time.Minute), nil // a minute: wall clocks jump
}

// How often acknowledgements are asked for soon after a root was prepared.
const (
	soon     = time.Minute
	soonPoll = 200 * time.Millisecond
)

// patience is until when acknowledgements are waited for: a quarter of the active root's life must remain. act may be nil: a joining replica
// need not hurry while others sign, and begins anew when half of its root's life is over.
func (a *Authority) patience(act, next *root) time.Time {
	switch {
	case act != nil:
		return act.cert.NotAfter.Add(-act.life() / 4)
	case a.peersSign():
		return next.created.Add(next.life() / 2)
	}
	return next.created.Add(next.life() / 4)
}

func (a *Authority) peersSign() bool { return a.cfg.Peers != nil && a.cfg.Peers.Signing() }

// activateWhenKnown activates next when it is acknowledged, or when the time to wait is over; one that nobody needs since others sign gives way to
// a fresh one instead.
func (a *Authority) activateWhenKnown(now time.Time, sequence uint64, act, next *root) error {
	deadline := a.patience(act, next)
	var missing []string
	if a.cfg.Acked != nil {
		ok, m := a.cfg.Acked(sequence)
		if ok && (!next.held || act == nil) {
			return a.Activate()
		}
		missing = m
	}
	if now.Before(deadline) {
		return nil
	}
	if act == nil && a.peersSign() {
		a.log.Warn("root not acknowledged by all for half of its life; others sign, and a fresh one is prepared", "missing", missing, "sequence", sequence)
		return a.prepareFresh(next.held)
	}
	if a.cfg.Acked != nil {
		a.metrics.unacknowledged.Inc()
		a.log.Error("root activated although not acknowledged by all; these may refuse its SVIDs until they load the bundle",
			"missing", missing, "sequence", sequence)
	}
	return a.Activate()
}

type metrics struct {
	signed         *prometheus.CounterVec
	failures       prometheus.Counter
	unacknowledged prometheus.Counter
}

func newMetrics(reg prometheus.Registerer, a *Authority) (*metrics, error) {
	m := &metrics{
		signed: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "hanse_ca_signed_total", Help: "Signatures of this replica, by kind (x509, jwt, ca)."}, []string{"kind"}),
		failures: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "hanse_ca_rotation_failures_total", Help: "Steps of a root rotation that failed and are tried again."}),
		unacknowledged: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "hanse_ca_unacknowledged_activations_total", Help: "Roots activated although somebody had not acknowledged them."}),
	}
	expiry := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "hanse_ca_root_expiry_timestamp_seconds", Help: "When the active root expires, in Unix seconds; 0 without one."},
		func() float64 {
			if r := a.state.Load().with(active); r != nil {
				return float64(r.cert.NotAfter.Unix())
			}
			return 0
		})
	roots := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "hanse_ca_roots", Help: "Roots of this replica in the bundle."},
		func() float64 { return float64(len(a.state.Load().roots)) })
	if reg == nil {
		return m, nil
	}
	for _, c := range []prometheus.Collector{m.signed, m.failures, m.unacknowledged, expiry, roots} {
		if err := reg.Register(c); err != nil {
			return nil, fmt.Errorf("register metrics: %w", err)
		}
	}
	return m, nil
}
