package balance

// levelHealth is what the arithmetic knows of one level.
type levelHealth struct {
	hosts     int // all
	available int // of them, those that may be used
	tenths    int // of available hosts' shares: 10 each, less while one is ramping
	dead      int // known to be no use, also in panic
}

// share is a level's part of the traffic.
type share struct {
	health  uint32 // percent, with overprovisioning
	load    uint32 // percent; all levels together 100
	panic   bool   // use all hosts that are not known dead, whatever their health
	damping bool   // hosts' ramps count
}

// distribute is Envoy's LoadBalancerBase::recalculatePerPriorityState and what it calls, in its integers. Two things are ours: a
// ramp counts only while the levels can carry 100 % with it, and in total panic a level is as large as its hosts that are not dead.
func distribute(levels []levelHealth, overprovisioning, panicThreshold uint32) []share {
	out := make([]share, len(levels))
	if len(levels) == 0 {
		return out
	}
	total := healths(levels, overprovisioning, true, out)
	if total < 100 {
		total = healths(levels, overprovisioning, false, out)
	}
	allPanic := total < 100
	for i, l := range levels {
		out[i].panic = total < 100 && (l.hosts == 0 || 100*uint32(l.available) < panicThreshold*uint32(l.hosts))
		allPanic = allPanic && out[i].panic
	}
	if allPanic {
		spread(levels, out)
		return out
	}
	left, first := uint32(100), -1
	for i := range out {
		if first < 0 && out[i].health > 0 {
			first = i
		}
		if total > 0 {
			out[i].load = min(left, out[i].health*100/total)
			left -= out[i].load
		}
	}
	out[max(first, 0)].load += left // what rounding left over
	return out
}

// healths fills in each level's health and returns their sum, at most 100.
func healths(levels []levelHealth, overprovisioning uint32, damping bool, out []share) uint32 {
	var total uint32
	for i, l := range levels {
		tenths := 10 * l.available
		if damping {
			tenths = l.tenths
		}
		out[i] = share{damping: damping}
		if l.hosts > 0 {
			out[i].health = min(100, uint32(uint64(overprovisioning)*uint64(tenths)/uint64(10*l.hosts)))
		}
		total = min(100, total+out[i].health)
	}
	return total
}

// spread is total panic: each level by its number of hosts.
func spread(levels []levelHealth, out []share) {
	size := func(l levelHealth) int { return l.hosts - l.dead }
	sum := 0
	for _, l := range levels {
		sum += size(l)
	}
	if sum == 0 { // all dead: they are all that there is
		size = func(l levelHealth) int { return l.hosts }
		for _, l := range levels {
			sum += size(l)
		}
	}
	left, first := uint32(100), 0
	for i := len(levels) - 1; i >= 0; i-- {
		if n := size(levels[i]); n > 0 {
			out[i].load = uint32(100 * n / sum)
			left -= out[i].load
			first = i
		}
	}
	out[first].load += left
}
