package drill

import (
	"slices"
	"time"

	"github.com/hanse-mesh/hanse/cmd/internal/admin"
	"github.com/hanse-mesh/hanse/discovery"
)

// Sample is what one caller's proxy reports of one endpoint since its last report.
type Sample struct {
	Time     time.Time
	Caller   string // proxy ID
	Service  discovery.Name
	Endpoint string // ID
	Cluster  string
	Zone     string
	OK       uint64
	Errors   uint64 // tries that failed, the retried ones included
	Retried  uint64 // of Errors: the call succeeded elsewhere
	P50, P99 time.Duration
	Events   []Event
}

// Event is a moment that a caller's proxy noticed.
type Event struct {
	Time   time.Time
	Kind   string // first_failure, ejected, shifted, returned
	Detail string
}

// Totals adds samples up.
type Totals struct {
	OK, Errors, Retried uint64
	p50, p99            weighted
}

type weighted struct {
	sum float64 // seconds × calls
	max time.Duration
	n   uint64
}

func (t *Totals) add(s Sample) {
	t.OK += s.OK
	t.Errors += s.Errors
	t.Retried += s.Retried
	t.p50.sum += s.P50.Seconds() * float64(s.OK)
	t.p50.n += s.OK
	if s.OK > 0 && s.P99 > t.p99.max {
		t.p99.max = s.P99
	}
}

// Failed is how many calls failed for good. A retry may be reported a moment before or after the failure that it made good, so that
// only sums can be compared.
func (t Totals) Failed() uint64 { return t.Errors - min(t.Errors, t.Retried) }

// Calls is how many calls ended.
func (t Totals) Calls() uint64 { return t.OK + t.Failed() }

// Success is the share that succeeded, 1 where there was none.
func (t Totals) Success() float64 {
	if t.Calls() == 0 {
		return 1
	}
	return float64(t.OK) / float64(t.Calls())
}

// P50 is the callers' medians, weighted by their calls.
func (t Totals) P50() time.Duration {
	if t.p50.n == 0 {
		return 0
	}
	return time.Duration(t.p50.sum / float64(t.p50.n) * float64(time.Second))
}

// P99 is the worst 99th percentile that any caller reported.
func (t Totals) P99() time.Duration { return t.p99.max }

// history is a bounded window of samples, oldest first.
type history struct{ samples []Sample }

const (
	historyLength  = 3 * time.Minute
	historySamples = 200_000 // a bound on memory; the oldest go first
)

func (h *history) add(s Sample) {
	h.samples = append(h.samples, s)
	old := s.Time.Add(-historyLength)
	drop := 0
	for drop < len(h.samples) && (h.samples[drop].Time.Before(old) || len(h.samples)-drop > historySamples) {
		drop++
	}
	if drop > 1024 || drop > len(h.samples)/2 {
		h.samples = slices.Clone(h.samples[drop:])
	}
}

// between returns the samples of [from, to).
func (h *history) between(from, to time.Time) []Sample {
	var out []Sample
	for _, s := range h.samples {
		if !s.Time.Before(from) && s.Time.Before(to) {
			out = append(out, s)
		}
	}
	return out
}

// moments is when the phases of a drill began and ended.
type moments struct {
	start    time.Time
	heal     time.Time // zero while it runs
	now      time.Time
	services map[discovery.Name]bool // hit ones; nil is every service
	targets  map[string]bool         // endpoint IDs that are hit
}

const baseline = 15 * time.Second

// report fills in the figures of d from the samples. It is pure.
func report(d *admin.Drill, samples []Sample, m moments) {
	end := m.now
	if !m.heal.IsZero() {
		end = m.heal
	}
	var before, during Totals
	type place struct{ service, cluster, zone string }
	shares := map[place]*[3]float64{}
	var sums [3]float64
	events := map[string]Event{}
	var firstBack time.Time
	callers := map[string]bool{}
	shifted := shiftTime(samples, m, end)
	for _, s := range samples {
		if m.services != nil && !m.services[s.Service] {
			continue
		}
		phase := -1
		switch {
		case s.Time.Before(m.start) && s.Time.After(m.start.Add(-baseline)):
			phase = 0
			before.add(s)
		case !s.Time.Before(m.start) && (m.heal.IsZero() || s.Time.Before(m.heal)):
			during.add(s)
			callers[s.Caller] = true
			if shifted.IsZero() || s.Time.After(shifted) {
				phase = 1
			}
		case !m.heal.IsZero() && !s.Time.Before(m.heal):
			if m.targets[s.Endpoint] && s.OK > 0 && firstBack.IsZero() {
				firstBack = s.Time
			}
			if !firstBack.IsZero() && s.Time.After(firstBack.Add(2*time.Second)) {
				phase = 2
			}
		}
		if phase >= 0 {
			p := place{s.Service.String(), s.Cluster, s.Zone}
			if shares[p] == nil {
				shares[p] = new([3]float64)
			}
			shares[p][phase] += float64(s.OK)
			sums[phase] += float64(s.OK)
		}
		for _, e := range s.Events {
			if !m.targets[s.Endpoint] || e.Time.Before(m.start) {
				continue
			}
			if old, ok := events[e.Kind]; !ok || e.Time.Before(old.Time) {
				events[e.Kind] = Event{Time: e.Time, Kind: e.Kind, Detail: e.Detail}
			}
		}
	}
	d.Calls, d.Failed, d.Retried, d.Success = during.Calls(), during.Failed(), during.Retried, during.Success()
	d.P50Before, d.P50During = ms(before.P50()), ms(during.P50())
	d.P99Before, d.P99During = ms(before.P99()), ms(during.P99())
	d.Elapsed = end.Sub(m.start).Seconds()

	since := func(t time.Time) *float64 { s := max(0, t.Sub(m.start).Seconds()); return &s }
	d.Detect, d.Shift, d.Return = nil, nil, nil
	d.Timeline = []admin.DrillMoment{{At: 0, Kind: "started", Detail: d.Spec.Mode + " " + scopeText(d.Spec.Scope)}}
	if e, ok := events["first_failure"]; ok && (m.heal.IsZero() || e.Time.Before(m.heal)) {
		d.Detect = since(e.Time)
		d.Timeline = append(d.Timeline, admin.DrillMoment{At: *d.Detect, Kind: e.Kind, Detail: e.Detail})
	}
	if !shifted.IsZero() {
		d.Shift = since(shifted)
		d.Timeline = append(d.Timeline, admin.DrillMoment{At: *d.Shift, Kind: "shifted", Detail: "callers no longer use what is drilled"})
	}
	if !m.heal.IsZero() {
		d.Timeline = append(d.Timeline, admin.DrillMoment{At: d.Elapsed, Kind: "healed", Detail: "fault removed"})
		if !firstBack.IsZero() {
			back := firstBack.Sub(m.heal).Seconds()
			d.Return = &back
			d.Timeline = append(d.Timeline, admin.DrillMoment{At: d.Elapsed + back, Kind: "returned", Detail: "calls are served here again"})
		}
	}
	slices.SortStableFunc(d.Timeline, func(a, b admin.DrillMoment) int { return int(1000 * (a.At - b.At)) })
	d.Traffic = nil
	for p, v := range shares {
		row := admin.DrillShare{Service: p.service, Cluster: p.cluster, Zone: p.zone}
		for i, out := range []*float64{&row.Before, &row.During, &row.After} {
			if sums[i] > 0 {
				*out = v[i] / sums[i]
			}
		}
		d.Traffic = append(d.Traffic, row)
	}
	slices.SortFunc(d.Traffic, func(a, b admin.DrillShare) int {
		return cmpString(a.Service, b.Service, a.Cluster, b.Cluster, a.Zone, b.Zone)
	})
}

// shiftTime is when callers had left what is drilled: the last ejection of a target during the drill, or, without one, the last report
// of a call there if later reports show none for 3 s. Zero: they have not, or there was none to begin with.
func shiftTime(samples []Sample, m moments, end time.Time) time.Time {
	var ejected, lastHit, lastSeen time.Time
	for _, s := range samples {
		if s.Time.Before(m.start) || !s.Time.Before(end) || m.services != nil && !m.services[s.Service] {
			continue
		}
		lastSeen = latest(lastSeen, s.Time)
		if !m.targets[s.Endpoint] {
			continue
		}
		if s.OK+s.Errors > 0 {
			lastHit = latest(lastHit, s.Time)
		}
		for _, e := range s.Events {
			if (e.Kind == "ejected" || e.Kind == "shifted") && e.Time.After(m.start) && e.Time.Before(end) {
				ejected = latest(ejected, e.Time)
			}
		}
	}
	switch {
	case !ejected.IsZero() && lastHit.Before(ejected.Add(2*time.Second)):
		return ejected
	case !lastHit.IsZero() && lastSeen.Sub(lastHit) > 3*time.Second:
		return lastHit
	}
	return time.Time{}
}

func latest(a, b time.Time) time.Time {
	if b.After(a) {
		return b
	}
	return a
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// cmpString compares pairs, first difference wins.
func cmpString(pairs ...string) int {
	for i := 0; i+1 < len(pairs); i += 2 {
		if pairs[i] != pairs[i+1] {
			if pairs[i] < pairs[i+1] {
				return -1
			}
			return 1
		}
	}
	return 0
}
