package v1alpha1

import "testing"

func TestMinSuccess(t *testing.T) {
	for text, want := range map[string]float64{"": 99, "success<99%": 99, "success < 99.5 %": 99.5, "success<0%": 0} {
		if got, err := (&DrillSpec{AbortIf: text}).MinSuccess(); err != nil || got != want {
			t.Errorf("%q: %v, %v; want %v", text, got, err, want)
		}
	}
	for _, text := range []string{"success<101%", "success<NaN%", "success>99%", "99%", "success<99", "latency<1%"} {
		if _, err := (&DrillSpec{AbortIf: text}).MinSuccess(); err == nil {
			t.Errorf("%q was accepted", text)
		}
	}
}
