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

const agentYAML = `
role: agent
cluster: {NAME}
trustDomain: {NAME}.test
namespace: shop
controlPlane: {identity: ["{IP}:7444"], xds: ["{IP}:7445"], trustBundle: bundle.json, tokenFile: {ACCOUNT}.token}
stateDir: {ACCOUNT}
socket: {ACCOUNT}/w.sock
admin: {listen: "{ADMIN}:15021"}
timers: {sync: 1s}
`

// TestPython is the Workload API as programs in Python see it, by the client of the SPIFFE project: workloads of two trust domains get SVIDs,
// JWT-SVIDs and both bundles, know each other by them, and follow renewals and a rotation.
func TestPython(t *testing.T) {
	need(t, "HANSE_WITHOUT_PYTHON", "make bin/tools/spiffe-venv/ready", program("spiffe-venv/bin/python"))
	netns.Test(t, func(t *testing.T) {
		l := newLab(t, ", x509Life: 6s, jwtLife: 30s, rootLife: 2h")
		env := os.Environ()
		for i, cluster := range []string{"west", "east"} {
			account := []string{"client", "server"}[i]
			l.save(l.path(cluster, account+".token"), l.hanse(cluster, "", "token", "create", "--agent", "shop/"+account))
			admin := fmt.Sprintf("127.0.%d.1", i+1)
			l.file(cluster, "agent.yaml", agentYAML, "{ACCOUNT}", account, "{ADMIN}", admin)
			l.run(l.core, cluster+"-agent", "hanse-proxy", "--config", l.path(cluster, "agent.yaml"))
			l.ready(l.core, admin+":15021")
			env = append(env, fmt.Sprintf("HANSE_%s=unix://%s", strings.ToUpper(cluster), l.path(cluster, account+"/w.sock")))
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
