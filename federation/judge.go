package federation

import (
	"cmp"
	"time"

	"github.com/hanse-mesh/hanse/discovery"
)

// Patience is how long a peer's silence is borne.
type Patience struct {
	Suspect time.Duration // without an answer of any kind
	Grace   time.Duration // instead, after an announced restart
	Recover time.Duration // of answers until it is fresh again; a gap as long begins anew
	Rounds  int           // failed probes of all addresses until it is withdrawn
	Quiet   time.Duration // without a success in any load report until it is withdrawn
}

// DefaultPatience is the protocol's.
func DefaultPatience() Patience { return Patience{}.WithDefaults() }

// WithDefaults fills fields that are zero with the protocol's.
func (p Patience) WithDefaults() Patience {
	return Patience{
		Suspect: cmp.Or(p.Suspect, 20*time.Second), Grace: cmp.Or(p.Grace, time.Minute), Recover: cmp.Or(p.Recover, 10*time.Second),
		Rounds: cmp.Or(p.Rounds, 3), Quiet: cmp.Or(p.Quiet, 15*time.Second),
	}
}

// Observed is what is known of one peer. Times are of the reader's monotonic clock.
type Observed struct {
	Answer      time.Time // last answer of its control plane
	Streak      time.Time // since when it has answered without a gap; see Heard
	Grace       time.Time // until when an announced restart excuses silence
	FailedRound int       // consecutive probes that failed on all addresses
	Success     time.Time // last success on its data path: a probe, or a load report
}

// Heard notes an answer of the control plane.
func (p Patience) Heard(o Observed, now time.Time) Observed {
	if o.Streak.IsZero() || now.Sub(o.Answer) >= p.Recover {
		o.Streak = now
	}
	o.Answer = now
	return o
}

// Probed notes one round of probes of the data path: ok if any address answered.
func (o Observed) Probed(ok bool, now time.Time) Observed {
	if !ok {
		o.FailedRound++
		return o
	}
	return o.Succeeded(now)
}

// Succeeded notes a success on the data path.
func (o Observed) Succeeded(now time.Time) Observed {
	o.FailedRound, o.Success = 0, now
	return o
}

// Judge returns the state of a peer. A peer becomes suspect by silence alone, and withdrawn only when its data path is dead too;
// one success on the data path brings it back to suspect, Recover of answers to fresh.
func (p Patience) Judge(was discovery.PeerState, o Observed, now time.Time) discovery.PeerState {
	silent := now.Sub(o.Answer) >= p.Suspect && !now.Before(o.Grace)
	if !silent && (was == discovery.Fresh || !o.Streak.IsZero() && now.Sub(o.Streak) >= p.Recover && now.Sub(o.Answer) < p.Recover) {
		return discovery.Fresh
	}
	dead := o.FailedRound >= p.Rounds && now.Sub(o.Success) >= p.Quiet
	if dead && (silent || was == discovery.Withdrawn) {
		return discovery.Withdrawn
	}
	return discovery.Suspect
}
