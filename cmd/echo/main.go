// Echo is the sample workload: it answers who and where it is, and who calls, over HTTP/1.1, HTTP/2 with prior knowledge, WebSocket,
// gRPC, raw TCP and UDP. It knows nothing of the mesh but two headers that its sidecar sets.
//
//	echo serve --http 127.0.0.1:9101 --tcp unix:/run/echo.sock --service payments --cluster west …
//	echo call  --proxy 127.0.0.1:15001 http://payments.shop:8080/
package main

import (
	"fmt"
	"io"
	"os"

	"github.com/hanse-mesh/hanse/cmd/internal/daemon"
)

const usage = `usage:
  echo serve [flags]        answer on the given addresses
  echo call [flags] URL     call http://, ws://, grpc://, xds:///, tcp:// or udp:// and print the answers as JSON lines
`

func main() { os.Exit(run(os.Args[1:], os.Stdout, os.Stderr)) }

// run returns 0 when all went well, 1 when not, 2 for wrong usage.
func run(args []string, stdout, stderr io.Writer) int {
	if len(args) == 0 {
		fmt.Fprint(stderr, usage)
		return 2
	}
	switch args[0] {
	case "serve":
		return serveMain(args[1:], stderr)
	case "call":
		return callMain(args[1:], stdout, stderr)
	case "--version", "-version":
		fmt.Fprintf(stdout, "echo %s\n", daemon.Version)
		return 0
	}
	fmt.Fprint(stderr, usage)
	return 2
}
