package federation

import (
	"time"

	"github.com/hanse-mesh/hanse/discovery"
)

// Times of the peer states (docs: failure modes).
const (
	SuspectAfter   = 20 * time.Second // without an answer of any kind
	RestartGrace   = 60 * time.Second // instead, after an announced restart
	FreshAfter     = 10 * time.Second // of answers
	WithdrawRounds = 3                // failed probes of all addresses
	WithdrawQuiet  = 15 * time.Second // without a success in any load report
)

// Observed is what is known of one peer. Times are of the reader's monotonic clock.
type Observed struct {
	Answer      time.Time // last answer of its control plane
	Streak      time.Time // since when it has answered without a gap of FreshAfter; see Heard
	Grace       time.Time // until when an announced restart excuses silence
	FailedRound int       // consecutive probes that failed on all addresses
	Success     time.Time // last success on its data path: a probe, or a load report
}

// Heard notes an answer of the control plane.
func (o Observed) Heard(now time.Time) Observed {
	if o.Streak.IsZero() || now.Sub(o.Answer) >= FreshAfter {
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
// one success on the data path brings it back to suspect, FreshAfter of answers to fresh.
func Judge(was discovery.PeerState, o Observed, now time.Time) discovery.PeerState {
	silent := now.Sub(o.Answer) >= SuspectAfter && !now.Before(o.Grace)
	if !silent && (was == discovery.Fresh || !o.Streak.IsZero() && now.Sub(o.Streak) >= FreshAfter && now.Sub(o.Answer) < FreshAfter) {
		return discovery.Fresh
	}
	dead := o.FailedRound >= WithdrawRounds && now.Sub(o.Success) >= WithdrawQuiet
	if dead && (silent || was == discovery.Withdrawn) {
		return discovery.Withdrawn
	}
	return discovery.Suspect
}
