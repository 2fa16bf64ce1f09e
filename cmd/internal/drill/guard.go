package drill

import (
	"fmt"
	"strconv"
	"strings"
	"time"
)

// guardWindow is how far back a guard looks; guardMinimum how many calls it must have seen to judge.
const (
	guardWindow  = 10 * time.Second
	guardMinimum = 20
)

// Guard aborts a drill.
type Guard struct {
	MinSuccess float64       // 0 to 1; 0 is not watched
	MaxP99     time.Duration // 0 is not watched
}

// ParseGuard reads "success<99%", "p99>500ms", or both joined by ",".
func ParseGuard(s string) (Guard, error) {
	var g Guard
	for part := range strings.SplitSeq(s, ",") {
		part = strings.ReplaceAll(part, " ", "")
		if v, ok := strings.CutPrefix(part, "success<"); ok {
			pct, err := strconv.ParseFloat(strings.TrimSuffix(v, "%"), 64)
			if err != nil || pct <= 0 || pct > 100 {
				return g, fmt.Errorf("guard %q: %q is not a percentage above 0 and up to 100", s, v)
			}
			g.MinSuccess = pct / 100
		} else if v, ok := strings.CutPrefix(part, "p99>"); ok {
			d, err := time.ParseDuration(v)
			if err != nil || d <= 0 {
				return g, fmt.Errorf("guard %q: %q is not a duration such as 500ms", s, v)
			}
			g.MaxP99 = d
		} else {
			return g, fmt.Errorf(`guard %q: want "success<99%%", "p99>500ms", or both joined by a comma`, s)
		}
	}
	return g, nil
}

// Tripped says why the guard trips on what callers saw in the last 10 s, or "".
func (g Guard) Tripped(t Totals) string {
	if t.Calls() < guardMinimum {
		return ""
	}
	if s := t.Success(); g.MinSuccess > 0 && s < g.MinSuccess && t.Failed() > 1 { // one call says nothing: its answer may have been under way
		return fmt.Sprintf("success %.2f%% < %g%% over %s (%d of %d calls failed)", 100*s, 100*g.MinSuccess, guardWindow, t.Failed(), t.Calls())
	}
	if g.MaxP99 > 0 && t.P99() > g.MaxP99 {
		return fmt.Sprintf("p99 %s > %s over %s", t.P99(), g.MaxP99, guardWindow)
	}
	return ""
}
