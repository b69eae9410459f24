// The way that most services in Node begin.
const http = require('http');
const os = require('os');

http.createServer(async (request, response) => {
  const pieces = [];
  for await (const piece of request) pieces.push(piece);
  const seen = { method: request.method, url: request.url, body: Buffer.concat(pieces).toString(), user: os.userInfo().username };
  response.setHeader('Content-Type', 'application/json');
  response.end(JSON.stringify(seen));
}).listen(process.env.PORT, process.env.HOSTNAME);

process.on('SIGTERM', () => process.exit(0));
