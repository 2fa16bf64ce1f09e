package interop

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/hanse-mesh/hanse/test/netns"
)

// TestPython is the Workload API as programs in Python see it, by the client of the SPIFFE project: workloads of two trust domains get SVIDs,
// JWT-SVIDs and both bundles, know each other by them, and follow renewals and a rotation.
func TestPython(t *testing.T) {
	need(t, "HANSE_WITHOUT_PYTHON", "make bin/tools/spiffe-venv/ready", program("spiffe-venv/bin/python"))
	netns.Test(t, func(t *testing.T) {
		l := newLab(t, shortLives)
		env := os.Environ()
		for cluster, socket := range l.agents() {
			env = append(env, fmt.Sprintf("HANSE_%s=unix://%s", strings.ToUpper(cluster), socket))
		}
		env = append(env, fmt.Sprintf("HANSE_ROTATE=%s --socket %s trust rotate", program("hanse"), l.path("west", "hansed.sock")))
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
		defer cancel()
		cmd := exec.CommandContext(ctx, program("spiffe-venv/bin/python"), "python/workload.py")
		cmd.Env = env
		out, err := cmd.CombinedOutput()
		if t.Logf("%s", out); err != nil {
			t.Error(err)
		}
	})
}
